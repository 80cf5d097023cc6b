"""What a decode step costs on the host beyond the kernels: the Python of packed linears, and of the step around them.

Nothing is to do in what is timed, so that a CPU tells what the host of a GPU would wait for:

    linear   every packed linear of the first block is called once with one row, while each kernel's `run` answers with a
             tensor made beforehand; the time over the number of linears. That is `QuantLinear` choosing its kernel, finding
             its layout and shaping its result, within torch's call of a module. The same of the original, whose linears answer
             alike, is what calling a module costs by itself.
    step     `Decoder`'s step, eagerly and for one sequence, with all these linears answering like that; over the number of
             blocks. Norms, attention, embedding and output head are there, and run; they are the same in each form of the
             model, so that the difference to the original is what packed linears add to a block.
    launch   `llmq.kernels.wna16.multiply` up to Triton's launcher, for each shape of the first block, one row: checks,
             configuration and the output's memory. What Triton's own launcher takes is not in it.

A CUDA graph pays none of this. Forms take turns; the median of the rounds is told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.bench.turns import in_turns
from llmq.bench.variants import Variant
from llmq.blocks.capture import find_blocks
from llmq.errors import LlmqError
from llmq.eval.models import wait
from llmq.hf.generation import Decoder
from llmq.kernels import layout, wna16
from llmq.kernels.registry import KERNELS
from llmq.serving.linear import QuantLinear, forward_overridden

PASSES, STEPS, PROMPT = 100, 20, 8


@torch.inference_mode()
def measure_overhead(variants: Sequence[Variant], seconds: float, rounds: int = 15) -> list[dict[str, Any]]:
    """A row for each form of the model, microseconds; one of them must be packed, which names the linears."""
    # The original's have the same names.
    names = [name for name, module in _packed(variants).named_modules() if isinstance(module, QuantLinear)]
    prefix, blocks = find_blocks(_packed(variants))
    first = [name for name in names if name.startswith(f"{prefix}.0.")]
    runs = [[_pass_of(variant, first) for variant in variants], [_steps_of(variant, names) for variant in variants]]
    passes, steps = in_turns(runs, seconds, rounds)
    if not steps[0]:
        raise LlmqError(f"seconds must suffice for one round of each form; {seconds:g} did not: give more")
    rows: list[dict[str, Any]] = []
    for variant, passed, stepped in zip(variants, passes, steps, strict=True):
        linear = 1e6 * statistics.median(passed) / PASSES / len(first)
        block = 1e6 * statistics.median(stepped) / STEPS / len(blocks)
        rows.append({"variant": variant.name, "linear_us": linear, "block_us": block, "linears": len(first)})
        rows[-1]["added_to_block_us"] = block - rows[0]["block_us"]
        rows[-1]["runs"] = len(stepped)
    return rows


def _packed(variants: Sequence[Variant]) -> nn.Module:
    for variant in variants:
        model: nn.Module = variant.model
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            return model
    raise LlmqError("one of the models must be packed; none is")


def _pass_of(variant: Variant, names: Sequence[str]) -> Callable[[], float]:
    """Calls the linears of a block in their order, those of one width with one x, `PASSES` times."""
    model = variant.model
    linears = [model.get_submodule(name) for name in names]
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    inputs = {
        linear.in_features: torch.zeros(1, 1, linear.in_features, device=device, dtype=dtype) for linear in linears
    }
    calls = [(linear, inputs[linear.in_features]) for linear in linears]

    @torch.inference_mode()
    def run() -> float:
        with nothing_to_do(model, names):
            began = time.perf_counter()
            for _ in range(PASSES):
                for linear, x in calls:
                    linear(x)
            return time.perf_counter() - began

    return run


def _steps_of(variant: Variant, names: Sequence[str]) -> Callable[[], float]:
    """Takes `STEPS` decode steps after a prompt."""
    decoder = Decoder(variant.model, 1, PROMPT + STEPS + 1)
    decoder.eager_because = decoder.eager_because or "the host's time is measured"
    ids = torch.zeros(1, PROMPT, dtype=torch.long, device=decoder.device)

    @torch.inference_mode()
    def run() -> float:
        with nothing_to_do(variant.model, names):
            decoder.prefill(ids)
            wait(decoder.device)
            began = time.perf_counter()
            for _ in range(STEPS):
                decoder.step()
            seconds = time.perf_counter() - began  # the device may still be at work: it is not waited for
            wait(decoder.device)
            return seconds

    return run


@contextmanager
def nothing_to_do(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Kernels, and dense linears of these names, answer with zeros that are made once for each shape."""
    made: dict[tuple[int, ...], Tensor] = {}

    def ready(x: Tensor, *shape: int) -> Tensor:
        found = made.get(shape)
        if found is None:
            found = made[shape] = x.new_zeros(shape)
        return found

    def run(x: Tensor, runtime: Any, bias: Tensor | None = None) -> Tensor:
        return ready(x, len(x), runtime.rows)

    def forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: ready(x, *x.shape[:-1], linear.out_features)

    runs = [kernel.run for kernel in KERNELS]
    found = (model.get_submodule(name) for name in names)
    dense = [module for module in found if isinstance(module, nn.Linear)]
    try:
        for kernel in KERNELS:
            kernel.run = run  # type: ignore[method-assign]
        with forward_overridden(dense, forward_of):
            yield
    finally:
        for kernel, own in zip(KERNELS, runs, strict=True):
            kernel.run = own  # type: ignore[method-assign]


@torch.inference_mode()
def launch_overhead(variants: Sequence[Variant], rounds: int = 15) -> list[dict[str, Any]]:
    """A row for each shape of the first block that the Triton kernel takes: its host code without a launch, microseconds."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    launch = wna16._launch
    for linear in (module for module in _packed(variants).modules() if isinstance(module, QuantLinear)):
        packed, dtype = linear.packed(), linear.weight_scale.dtype
        shape = (packed.rows, packed.columns)
        taken = dtype in wna16.DTYPES and layout.refusal(packed.columns, packed.group_size, packed.bits, dtype) is None
        if shape in rows or not taken:
            continue
        tiled, x = layout.tile(packed), torch.zeros(1, packed.columns, dtype=dtype, device=linear.device)
        try:
            wna16._launch = lambda *_: None
            times = [_many(partial(wna16.run, x, tiled)) for _ in range(rounds)]
        finally:
            wna16._launch = launch
        rows[shape] = {"n": shape[0], "k": shape[1], "host_us": 1e6 * statistics.median(times) / PASSES}
    return list(rows.values())


def _many(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(PASSES):
        call()
    return time.perf_counter() - began
