"""Everything that only a GPU can show: `pytest -m gpu`. Without a CUDA device every test is skipped.

The kernels are compiled here, which takes minutes; `scripts/bench_kernels.py --check-only --jobs N` compiles most of them in
parallel beforehand. The checks themselves are in `gpu_checks.py`, which also runs on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.bench.kernels.checking import KernelCase, cases
from llmq.bench.kernels.timing import SELF_TEST, cache_bytes, ceilings, time_calls
from llmq.kernels import dequant, wna16
from llmq.kernels.problem import Problem
from tests import gpu_checks


def missing() -> str | None:
    """The reason why nothing can be tested here; None if everything can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    problem = Problem(64, 128, 4, 128, True, torch.float16, torch.float16, "cuda")
    refusal = wna16.refusal(problem)
    return None if refusal is None else f"the Triton kernel {refusal}"


MISSING = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
DEVICE = "cuda"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("case", cases(small=False), ids=str)
def test_every_kernel_equals_float64(case: KernelCase) -> None:
    kernels = {"slab", "triton"} if case.bits in (4, 8) else {"slab"}
    gpu_checks.assert_case_right(case, DEVICE, kernels)


@pytest.mark.parametrize("dtype", dequant.DTYPES, ids=str)
@pytest.mark.parametrize("scales", dequant.DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", dequant.BITS)
def test_dequantized_rows_have_the_bits_of_the_cpu(
    bits: int, symmetric: bool, scales: torch.dtype, dtype: torch.dtype
) -> None:
    for shape in ((1, 1, 1), (70, 640, 128), (5, 1100, 100), (33, 1056, 48)):
        gpu_checks.assert_dequantized_bits(bits, symmetric, scales, dtype, DEVICE, shape)


@pytest.fixture(
    scope="module",
    params=[(4, True, "float16"), (4, False, "bfloat16"), (8, False, "float16"), (8, True, "bfloat16")],
    ids=lambda value: f"int{value[0]}-{'sym' if value[1] else 'asym'}-{value[2]}",
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_checks.make_checkpoint(tmp_path_factory.mktemp("tiny") / "out", *request.param)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_model_equals_the_reference(folder: Path, fuse: bool) -> None:
    gpu_checks.assert_model_equals_reference(folder, DEVICE, "triton", fuse)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_captured_graph_equals_eager_steps(folder: Path, fuse: bool) -> None:
    gpu_checks.assert_graph_equals_eager(folder, DEVICE, "triton", fuse)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_two_threads_share_a_model(folder: Path, fuse: bool) -> None:
    gpu_checks.assert_model_in_threads(folder, DEVICE, "triton", fuse)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_threads_do_not_interfere(dtype: torch.dtype) -> None:
    gpu_checks.assert_threads_do_not_interfere(DEVICE, "triton", dtype, 200)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_graphs_do_not_interfere(dtype: torch.dtype) -> None:
    gpu_checks.assert_graphs_do_not_interfere(DEVICE, "triton", dtype, 200)


def test_a_replayed_timing_grows_with_the_work() -> None:
    device = torch.device(DEVICE, torch.cuda.current_device())
    assert cache_bytes(device) > 1 << 20
    limits = ceilings(device, torch.float16, SELF_TEST)
    assert limits.copy > 1e9
    assert limits.flops > 1e9
    times = []
    for size in (1 << 20, 1 << 26):
        source, target = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
        times.append(time_calls([lambda s=source, t=target: t.copy_(s)], device, SELF_TEST).us)
    assert times[1] > 4 * times[0] > 0
