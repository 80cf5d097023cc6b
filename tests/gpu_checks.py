"""The checks of `test_gpu.py`, as functions of a device and a kernel, so that they also run on the CPU.

`test_gpu_checks.py` runs them on the CPU with the CPU's kernels, and `interpreted_gpu.py` with the Triton kernel in its
interpreter. Only CUDA graphs, streams and the assembly need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmq
from llmq.bench.kernels.checking import KernelCase, check_case
from llmq.bench.kernels.contenders import problem_of
from llmq.bench.kernels.truth import draw, draw_input
from llmq.hf.generation import Decoder
from llmq.kernels import counters, dequant, slab
from llmq.kernels.problem import Packed
from llmq.kernels.registry import choose
from llmq.serving.fused import fused_linears
from llmq.serving.linear import QuantLinear
from tests.tiny import VOCAB, tiny_model

IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
NEW = 8
LOGITS_SHARE = {torch.float16: 2 * 2**-10, torch.bfloat16: 2**-5}
"""Allowed difference of logits as a share of the largest one: two roundings."""


def assert_case_right(case: KernelCase, device: str, kernels: set[str], repeats: int = 10, seed: int = 7) -> None:
    """Every kernel that takes the case equals float64 up to rounding, `repeats` times with the same bits.

    kernels: names that must be among those kernels.
    """
    outcome = check_case(case, device, seed, repeats)
    assert kernels <= set(outcome.kernels), f"expected {sorted(kernels)}, got {outcome.kernels}"
    assert outcome.products == len(case.rows) * len(outcome.kernels)
    assert not outcome.wrong, "; ".join(outcome.wrong)


def on_device(packed: Packed, device: str) -> Packed:
    """The weight with its tensors on a device."""
    zero = None if packed.zero is None else packed.zero.to(device)
    return replace(packed, weight=packed.weight.to(device), scale=packed.scale.to(device), zero=zero)


def assert_dequantized_bits(
    bits: int, symmetric: bool, scales: torch.dtype, dtype: torch.dtype, device: str, shape: tuple[int, int, int]
) -> None:
    """The dequantize kernel has the bits of the slab kernel on the CPU. shape: N, K, group size."""
    packed = draw(torch.Generator().manual_seed(bits), *shape, symmetric, scales, bits)
    weight = on_device(packed, device)
    for start, stop in ((0, shape[0]), (shape[0] // 3, shape[0])):
        expected = slab.dequantize(packed, slab.zero_points(packed), start, stop, dtype)
        got = dequant.dequantize(weight, start, stop, dtype).cpu()
        assert torch.equal(got, expected), (
            f"{int((got != expected).sum())} elements of rows {start} .. {stop - 1} differ"
        )


def make_checkpoint(folder: Path, bits: int, symmetric: bool, dtype: str) -> Path:
    """A tiny quantized model of two blocks."""
    config = llmq.QuantConfig(method="rtn", bits=bits, group_size=32, symmetric=symmetric, dtype=dtype)
    llmq.quantize(tiny_model("qwen2", layers=2), folder, config)
    return folder


def loaded(folder: Path, kernel: str, device: str, fuse: bool = False) -> Any:
    """The model on a device, with every linear on one kernel; it never stops early."""
    model = llmq.load(folder, kernel=kernel, fuse=fuse, device_map=device)
    model.generation_config.eos_token_id = None
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert linears
    assert {linear.device.type for linear in linears} == {torch.device(device).type}
    for rows in (1, IDS.numel(), 512):
        assert {linear.choice(model.dtype, rows).kernel.name for linear in linears} == {kernel}
    assert bool(fused_linears(model)) == fuse
    return model


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """float32 logits on the CPU."""
    return model(input_ids=ids.to(model.device)).logits.float().cpu()


def generated(model: Any, ids: Tensor) -> Tensor:
    """The ids and the tokens of transformers' greedy `generate`, on the CPU."""
    ids = ids.to(model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False).cpu()


def assert_same_tokens(model: Any, expected: Tensor, got: Tensor, noise: float) -> None:
    """Equal up to the first position of each sequence where two tokens have logits closer than `noise`.

    model: gives the logits.
    """
    assert got.shape == expected.shape
    for row in range(len(expected)):
        differing = (expected[row] != got[row]).nonzero()
        if len(differing):
            position = int(differing[0])
            logits = logits_of(model, expected[row : row + 1, :position])[0, -1]
            gap = abs(float(logits[expected[row, position]] - logits[got[row, position]]))
            assert gap <= noise, f"sequence {row}, position {position}: logits differ by {gap:.3g}"


def assert_model_equals_reference(folder: Path, device: str, kernel: str, fuse: bool) -> None:
    """Logits and greedy tokens of a model on a kernel are those on the reference kernel, up to rounding."""
    reference, model = loaded(folder, "reference", device), loaded(folder, kernel, device, fuse)
    expected = logits_of(reference, IDS)
    allowed = LOGITS_SHARE[model.dtype] * float(expected.abs().max())
    difference = float((logits_of(model, IDS) - expected).abs().max())
    assert difference <= allowed, f"logits differ by {difference:.3g}, allowed are {allowed:.3g}"
    assert_same_tokens(reference, generated(reference, IDS), generated(model, IDS), 2 * allowed)


def assert_graph_equals_eager(folder: Path, device: str, kernel: str, fuse: bool) -> None:
    """Decoding by graph replay gives the tokens of the same steps run eagerly, and those of `generate` up to rounding.

    On the CPU there is no graph: both decoders run eagerly.
    """
    model = loaded(folder, kernel, device, fuse)
    llmq.warmup(model, rows=[len(IDS), IDS.numel()])
    eager, replayed = (Decoder(model, len(IDS), IDS.shape[1] + NEW) for _ in range(2))
    eager.eager_because = "the test compares with eager steps"
    expected = eager.generate(IDS.to(device), NEW).cpu()
    assert eager.graph is None
    for _ in range(3):
        tokens = replayed.generate(IDS.to(device), NEW).cpu()
        assert torch.equal(tokens, expected), f"{tokens.tolist()} instead of {expected.tolist()}"
    if torch.device(device).type == "cuda":
        assert replayed.eager_because is None, replayed.eager_because
        assert replayed.graph is not None
    assert torch.equal(llmq.generate_fast(model, IDS.to(device), NEW).cpu(), expected)
    noise = 4 * LOGITS_SHARE[model.dtype] * float(logits_of(model, IDS).abs().max())
    assert_same_tokens(model, generated(model, IDS), expected, noise)


def in_threads(work: Sequence[Callable[[], None]]) -> None:
    """Run each function in its own thread at the same time; raise the first error."""
    with ThreadPoolExecutor(len(work)) as pool:
        for future in [pool.submit(one) for one in work]:
            future.result()


def own_stream(device: str) -> Any:
    """A context with a new CUDA stream that waits for earlier work; nothing on the CPU."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(torch.device(device)))
    return torch.cuda.stream(stream)


def products(device: str, kernel: str, dtype: torch.dtype, count: int) -> list[Callable[[], Tensor]]:
    """Products of different weights [320, 2048] with one row each; K is deep enough to be split."""
    calls = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        packed = on_device(draw(generator, 320, 2048, 128, False, dtype), device)
        x = draw_input(generator, 1, 2048, dtype).to(device)
        chosen = choose(problem_of(packed, dtype), 1, kernel).kernel
        runtime = chosen.prepare(packed)
        calls.append(lambda x=x, chosen=chosen, runtime=runtime: chosen.run(x, runtime))
    return calls


@torch.no_grad()
def assert_threads_do_not_interfere(device: str, kernel: str, dtype: torch.dtype, repeats: int) -> None:
    """Two threads, each on its own stream, compute the bits that one thread computes."""
    calls = products(device, kernel, dtype, 2)
    expected = [call() for call in calls]

    def repeat(index: int) -> None:
        with torch.no_grad(), own_stream(device):
            results = [calls[index]() for _ in range(repeats)]
            wrong = sum(not torch.equal(result, expected[index]) for result in results)
            assert not wrong, f"{wrong} of {repeats} results differ in thread {index}"

    in_threads([lambda: repeat(0), lambda: repeat(1)])


@torch.no_grad()
def assert_graphs_do_not_interfere(device: str, kernel: str, dtype: torch.dtype, repeats: int) -> None:
    """Two graphs, replayed at the same time by two threads on two streams, compute the bits of eager calls.

    On the CPU the calls run in place of the replays.
    """
    calls = products(device, kernel, dtype, 2)
    expected = [call() for call in calls]
    replays: list[Callable[[], Tensor]] = list(calls)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        replays = [captured(call) for call in calls]

    def repeat(index: int) -> None:
        with torch.no_grad(), own_stream(device):
            wrong = sum(not torch.equal(replays[index](), expected[index]) for _ in range(repeats))
            assert not wrong, f"{wrong} of {repeats} replays differ in thread {index}"

    in_threads([lambda: repeat(0), lambda: repeat(1)])
    if torch.device(device).type == "cuda":
        replays.clear()
        torch.cuda.synchronize(device)
        counters.forget(torch.device("cuda", torch.cuda.current_device()))


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that replays `call` from a CUDA graph on the current stream and returns its output."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def assert_model_in_threads(folder: Path, device: str, kernel: str, fuse: bool) -> None:
    """Two threads that share one model get its logits, up to the rounding of matmuls on different streams."""
    model = loaded(folder, kernel, device, fuse)
    inputs = [IDS, IDS.flip(1)]
    expected = [logits_of(model, ids) for ids in inputs]
    allowed = LOGITS_SHARE[model.dtype] * max(float(logits.abs().max()) for logits in expected)
    assert float((expected[0] - expected[1]).abs().max()) > 2 * allowed, "the inputs must give different logits"

    def repeat(index: int) -> None:
        with own_stream(device):
            for _ in range(5):
                difference = float((logits_of(model, inputs[index]) - expected[index]).abs().max())
                assert difference <= allowed, f"logits differ by {difference:.3g} in thread {index}"

    in_threads([lambda: repeat(0), lambda: repeat(1)])
