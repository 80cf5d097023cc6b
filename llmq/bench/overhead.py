"""The host time of a decode step beyond its kernels: the Python of packed linears, and of the step around them.

The timed code has no work to do, so that a CPU shows the host time of a GPU run:

    linear   every packed linear of the first block is called once with one row, while each kernel returns a tensor made
             beforehand; the time divided by the number of linears. This is `QuantLinear` choosing its kernel, finding its
             layout and shaping its result, within torch's call of a module. The same for the original, whose linears are
             stubbed too, is the cost of calling a module.
    step     `Decoder`'s step, eagerly and for one sequence, with all linears stubbed; divided by the number of blocks. Norms,
             attention, embedding and output head still run; they are the same in each form of the model, so the difference to
             the original is what packed linears add to a block.
    launch   `llmq.kernels.wna16.multiply` up to Triton's launcher, for each shape of the first block, one row: checks,
             configuration and the output's memory. Triton's own launcher is not included.

A CUDA graph has none of this cost. Forms take turns; the result is the median of the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.bench.turns import in_turns
from llmq.bench.variants import Variant, packed_linears
from llmq.blocks.capture import find_blocks
from llmq.errors import LlmqError
from llmq.eval.models import wait
from llmq.hf.generation import Decoder
from llmq.kernels import layout, wna16
from llmq.kernels.kernel import RuntimeLayout
from llmq.kernels.registry import KERNELS
from llmq.serving.linear import QuantLinear
from llmq.serving.overrides import forward_overridden, kernels_overridden

PASSES, STEPS, PROMPT = 100, 20, 8


@torch.inference_mode()
def measure_overhead(variants: Sequence[Variant], seconds: float, rounds: int = 15) -> list[dict[str, Any]]:
    """A row for each form of the model, in microseconds. One of them must be packed; it names the linears."""
    # The linears of the original have the same names.
    names = [name for name, module in _packed(variants).named_modules() if isinstance(module, QuantLinear)]
    prefix, blocks = find_blocks(_packed(variants))
    first = [name for name in names if name.startswith(f"{prefix}.0.")]
    runs = [[_pass_of(variant, first) for variant in variants], [_steps_of(variant, names) for variant in variants]]
    passes, steps = in_turns(runs, seconds, rounds)
    if not steps[0]:
        raise LlmqError(f"{seconds:g} seconds are too few for one round of each form; raise seconds")
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
    """A run that calls the linears of a block in order, those of one width with one x, `PASSES` times."""
    model = variant.model
    linears = [model.get_submodule(name) for name in names]
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    inputs = {
        linear.in_features: torch.zeros(1, 1, linear.in_features, device=device, dtype=dtype) for linear in linears
    }
    calls = [(linear, inputs[linear.in_features]) for linear in linears]

    @torch.inference_mode()
    def run() -> float:
        with kernels_stubbed(model, names):
            began = time.perf_counter()
            for _ in range(PASSES):
                for linear, x in calls:
                    linear(x)
            return time.perf_counter() - began

    return run


def _steps_of(variant: Variant, names: Sequence[str]) -> Callable[[], float]:
    """A run of `STEPS` decode steps after a prompt."""
    decoder = Decoder(variant.model, 1, PROMPT + STEPS + 1)
    decoder.eager_because = decoder.eager_because or "the host's time is measured"
    ids = torch.zeros(1, PROMPT, dtype=torch.long, device=decoder.device)

    @torch.inference_mode()
    def run() -> float:
        with kernels_stubbed(variant.model, names):
            decoder.prefill(ids)
            wait(decoder.device)
            began = time.perf_counter()
            for _ in range(STEPS):
                decoder.step()
            seconds = time.perf_counter() - began  # host time only: the device may still be busy
            wait(decoder.device)
            return seconds

    return run


@contextmanager
def kernels_stubbed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While open, kernels, and dense linears of these names, return zeros that are made once for each shape."""
    zeros: dict[tuple[int, ...], Tensor] = {}

    def zeros_of(x: Tensor, *shape: int) -> Tensor:
        made = zeros.get(shape)
        if made is None:
            made = zeros[shape] = x.new_zeros(shape)
        return made

    def run(x: Tensor, runtime: RuntimeLayout, bias: Tensor | None = None) -> Tensor:
        return zeros_of(x, len(x), runtime.out_features)

    def forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: zeros_of(x, *x.shape[:-1], linear.out_features)

    modules = (model.get_submodule(name) for name in names)
    dense = [m for m in modules if isinstance(m, nn.Linear) and not isinstance(m, QuantLinear)]
    stubs = [replace(kernel, run=run) for kernel in KERNELS]
    with kernels_overridden(packed_linears(model), stubs), forward_overridden(dense, forward_of):
        yield


@torch.inference_mode()
def launch_overhead(variants: Sequence[Variant], rounds: int = 15) -> list[dict[str, Any]]:
    """A row for each shape of the first block that the Triton kernel takes: its host code without a launch, microseconds."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for linear in (module for module in _packed(variants).modules() if isinstance(module, QuantLinear)):
        packed, dtype = linear.packed(), linear.weight_scale.dtype
        shape = (packed.out_features, packed.in_features)
        refused = layout.refusal(packed.in_features, packed.group_size, packed.bits, dtype)
        if shape in rows or dtype not in wna16.DTYPES or refused:
            continue
        tiled, x = layout.tile(packed), torch.zeros(1, packed.in_features, dtype=dtype, device=linear.device)
        times = [_time_passes(x, tiled) for _ in range(rounds)]
        rows[shape] = {"n": shape[0], "k": shape[1], "host_us": 1e6 * statistics.median(times) / PASSES}
    return list(rows.values())


def _time_passes(x: Tensor, tiled: layout.Tiled) -> float:
    began = time.perf_counter()
    for _ in range(PASSES):
        wna16.multiply(x, tiled, launcher=_no_launch)
    return time.perf_counter() - began


def _no_launch(*arguments: object) -> None:
    """In place of Triton's launch."""
