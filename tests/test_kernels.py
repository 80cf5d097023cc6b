"""Packed matmuls: the reference against float64 and Python integers, every kernel against the reference.

Memory that a kernel allocates is filled with NaN first, so that an element that is not written shows. Error messages have the
root mean square and the maximum, relative to the expected values, with the worst coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.core.grid import Grid, fit, quantize
from llmq.core.packing import pack
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.formats import IN_MEMORY
from llmq.kernels import cpu_int4, reference, slab, wna16
from llmq.kernels.kernel import Kernel
from llmq.kernels.problem import Packed, Problem
from llmq.kernels.registry import KERNELS, choose, kernel_ranges
from tests.fixtures import fit_full_range

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((32, 2), (48, 3), (5, 1))  # rows, groups
CASES = [
    (rows, groups, size, bits, symmetric)
    for rows, groups in SHAPES
    for size in (16, 32, 96, 256)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
]
# The error of rounding y to bfloat16, and of rounding each weight too.
ROUNDED_ONCE, ROUNDED_TWICE = 2**-8, 2**-7


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def weight_of(
    rows: int, columns: int, size: int | None, bits: int, symmetric: bool, dtype: torch.dtype = BF16
) -> QuantizedWeight:
    """A weight with scales of both signs (where symmetric), one the smallest normal number, and zeros at both ends."""
    generator = torch.Generator().manual_seed(rows + bits)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0] = weight[0].abs() + 0.1
    weight[-1] = -weight[-1].abs() - 0.1
    grid = Grid(bits, size, symmetric)
    scale, zero = (fit_full_range if symmetric else fit)(weight, grid, dtype)
    if rows > 2:
        scale[1, 0] = torch.finfo(dtype).tiny
    return quantize(weight, scale, zero, grid)


def packed_of(weight: QuantizedWeight) -> Packed:
    tensors = IN_MEMORY.encode(weight)
    sizes = (*weight.shape, weight.bits, weight.group_size)
    return Packed(*sizes, tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point"))


def problem_of(packed: Packed, dtype: torch.dtype, **more: Any) -> Problem:
    sizes = (packed.out_features, packed.in_features, packed.bits, packed.group_size)
    return Problem(*sizes, packed.zero is None, packed.scale.dtype, dtype, packed.weight.device.type, **more)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Root mean square within `tolerance` of that of `want`, and no element off by eight times as much."""
    assert got.shape == want.shape
    assert bool(torch.isfinite(got).all()), f"not written: {(~torch.isfinite(got)).nonzero()[:3].tolist()}"
    if not want.numel():
        return
    error, size = (got.double() - want.double()).abs(), want.double().pow(2).mean().sqrt()
    worst = error.flatten().argmax().item()
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape)]
    message = f"rms {error.pow(2).mean().sqrt() / size:.2e}, worst {error.max() / size:.2e} at {where}"
    assert error.pow(2).mean().sqrt() <= tolerance * size, message
    assert error.max() <= 8 * tolerance * size, message


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reference_unpack_reads_a_little_endian_stream(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 45), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes, bits)
    for row, code in zip(words.tolist(), codes.tolist(), strict=True):
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(row))
        assert [(stream >> (bits * index)) & ((1 << bits) - 1) for index in range(45)] == code
    assert torch.equal(reference.unpack(words, bits, 45), codes.long())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_the_formula(case: tuple[int, int, int, int, bool]) -> None:
    rows, groups, size, bits, symmetric = case
    weight = weight_of(rows, groups * size, size, bits, symmetric)
    packed = packed_of(weight)
    zero = torch.full_like(weight.scale, packed.middle) if weight.zero is None else weight.zero
    want = torch.empty(weight.shape, dtype=torch.float64)
    for column in range(weight.shape[1]):
        group = column // size
        want[:, column] = (weight.codes[:, column].double() - zero[:, group].double()) * weight.scale[:, group].double()
    assert torch.equal(reference.dequantize(packed, torch.float64), want)
    x, bias = torch.randn(3, groups * size, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    got = reference.run(x, packed, bias, torch.float64)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, want, bias))
    assert_near(reference.run(x.float(), packed, bias.float()), got, 1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_equal_the_reference(kernel: Kernel, case: tuple[int, int, int, int, bool]) -> None:
    rows, groups, size, bits, symmetric = case
    packed = packed_of(weight_of(rows, groups * size, size, bits, symmetric))
    if all(kernel.refusal(problem_of(packed, dtype)) for dtype in (torch.float64, F32, F16, BF16)):
        pytest.skip(f"{kernel.name} {kernel.refusal(problem_of(packed, BF16))}")
    for dtype, tolerance in ((torch.float64, 1e-6), (F32, 1e-6), (F16, 2**-10), (BF16, ROUNDED_TWICE)):
        if kernel.refusal(problem_of(packed, dtype)):
            continue
        layout = kernel.prepare(packed)
        for batch in (0, 1, 7, 50):
            x = (torch.randn(batch, packed.in_features, generator=torch.Generator().manual_seed(batch)) + 0.3).to(dtype)
            got = kernel.run(x, layout)
            assert got.dtype == dtype
            assert_near(got, reference.run(x.double(), packed, dtype=torch.float64), tolerance)
            assert torch.equal(got, kernel.run(x, layout)), "deterministic"
            strided = torch.cat((x, x), 1)[:, : packed.in_features]
            assert torch.equal(got, kernel.run(strided, layout)), "for any strides"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([1, 3, 16, 32, 40, 64]),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from([BF16, F16, F32]),
    st.sampled_from([BF16, F32]),
    st.integers(0, 5),
)
def test_any_shape_is_within_rounding(
    rows: int, groups: int, size: int, bits: int, symmetric: bool, stored: torch.dtype, dtype: torch.dtype, batch: int
) -> None:
    packed = packed_of(weight_of(rows, groups * size, size, bits, symmetric, stored))
    x = torch.randn(batch, packed.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    want = x.double() @ reference.dequantize(packed).to(dtype).double().T
    problem = problem_of(packed, dtype)
    for entry in kernel_ranges(problem):
        got = entry.kernel.run(x, entry.kernel.prepare(packed))
        bound = (x.double().abs() @ reference.dequantize(packed, torch.float64).abs().T) * (
            1e-6 if dtype == F32 else 3 * ROUNDED_ONCE
        )
        assert bool(((got.double() - want).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int4_layout_stores_every_weight_exactly(bits: int) -> None:
    packed = packed_of(weight_of(48, 96, 32, bits, True))
    assert torch.equal(cpu_int4.run(torch.eye(96, dtype=BF16), cpu_int4.prepare(packed)).T, dense(packed, BF16))


def dense(packed: Packed, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(packed).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_int4_zero_points_lose_nothing_with_means_off_zero(bits: int) -> None:
    generator, grid = torch.Generator().manual_seed(0), Grid(bits, 64, False)
    weight = torch.randn(64, 16, 64, generator=generator) + torch.randn(64, 16, 1, generator=generator)
    weight = weight.view(64, 1024) - weight.mean((1, 2)).unsqueeze(1)  # otherwise y is large and hides the error
    packed = packed_of(quantize(weight, *fit(weight, grid, BF16), grid))
    x = (torch.randn(8, 1024, generator=generator) + 2).to(BF16)
    want = reference.run(x.double(), packed, dtype=torch.float64)
    layout = cpu_int4.prepare(packed)
    assert_near(cpu_int4.run(x, layout), want, ROUNDED_ONCE)
    with pytest.raises(AssertionError, match="rms"):  # the rounded-off part of the zero points matters here
        assert_near(cpu_int4.run(x, replace(layout, zero_remainder=None)), want, 2 * ROUNDED_ONCE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_slabs_equal_the_quantized_weight_to_the_bit(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(48, 96, 32, bits, symmetric)
    packed, x = packed_of(weight), torch.randn(4, 96)
    before = packed.weight.clone()
    for dtype in (F32, BF16, F16):
        got = slab.dequantize(packed, slab.zero_points(packed), 5, 31, dtype)
        assert torch.equal(got, weight.dequantize(dtype)[5:31])
    whole = slab.run(x, packed)
    monkeypatch.setattr(slab, "SLAB", 7 * 96)
    torch.testing.assert_close(slab.run(x, packed), whole)
    assert torch.equal(packed.weight, before), "the stored tensors are not changed"


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_flow_without_keeping_dense_weights(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "SLAB", 7 * 96)
    packed = packed_of(weight_of(48, 96, 32, 4, symmetric))
    kept: list[int] = []
    x = torch.randn(3, 96, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = slab.run(x, packed)
    y.pow(2).sum().backward()
    weight = dense(packed, torch.float64)
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.T) @ weight, rtol=1e-6, atol=1e-6)
    assert sum(kept) <= 48 * 96  # bytes; float32 would be four times as much


def test_slab_operator_passes_opcheck() -> None:
    packed = packed_of(weight_of(48, 96, 32, 4, False))
    sizes = (packed.out_features, packed.in_features, packed.bits, packed.group_size)
    x = torch.randn(3, 96, requires_grad=True)
    torch.library.opcheck(torch.ops.llmq.slab_linear.default, (x, packed.weight, packed.scale, packed.zero, *sizes))


PROBLEM = Problem(32, 192, 4, 64, True, BF16, BF16, "cpu")
FOUR = (cpu_int4.KERNEL, wna16.KERNEL, slab.KERNEL, reference.KERNEL)
"""The kernels that the tests of the choice are about, whatever else the registry holds."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group_size": 48}, "requires group_size divisible by 32; got 48"),
        ({"out_features": 20}, "requires out_features divisible by 16; got 20"),
        ({"device": "cuda"}, "requires the CPU; the weight is on cuda"),
        ({"dtype": F32}, "requires bfloat16 input; got float32"),
        ({"dtype": F16}, "requires bfloat16 input; got float16"),
        ({"scale_dtype": F16}, "requires bfloat16 scales; got float16"),
        ({"offloaded": True}, "the weight is offloaded"),
    ],
)
def test_refusals_state_rule_and_value(change: dict[str, Any], reason: str) -> None:
    problem = replace(PROBLEM, **change)
    refusal = cpu_int4.refusal(problem)
    assert refusal is not None
    assert reason in refusal
    choice = choose(problem, 1, kernels=FOUR)
    assert choice.kernel is slab.KERNEL
    refused = dict(choice.refused)
    assert list(refused) == ["cpu_int4", "triton", "reference"]
    assert (refused["cpu_int4"], refused["reference"]) == (refusal, "comes after slab")


def test_a_cpu_without_vector_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_int4, "vector_code", lambda: "NEON")
    assert "torch uses NEON on this CPU" in str(cpu_int4.refusal(PROBLEM))


def test_the_number_of_rows_decides_the_kernel() -> None:
    most = cpu_int4.MAX_ROWS
    assert choose(PROBLEM, most, kernels=FOUR).kernel is cpu_int4.KERNEL
    later = dict(choose(PROBLEM, 0, kernels=FOUR).refused)
    assert (later["slab"], later["reference"]) == ("comes after cpu_int4", "comes after cpu_int4")
    many = choose(PROBLEM, most + 1, kernels=FOUR)
    assert many.kernel is slab.KERNEL
    assert many.refused[0] == ("cpu_int4", f"runs at most {most} rows")
    ranges = [(entry.max_rows, entry.kernel) for entry in kernel_ranges(PROBLEM, kernels=FOUR)]
    assert ranges == [(most, cpu_int4.KERNEL), (None, slab.KERNEL)]


def test_a_forced_kernel_runs_every_m_or_states_why_not() -> None:
    for kernel in (cpu_int4.KERNEL, slab.KERNEL, reference.KERNEL):
        choice = choose(PROBLEM, 10**6, kernel.name, FOUR)
        assert choice.kernel is kernel
        others = [reason for name, reason in choice.refused if name != "triton"]
        assert others == [f"is not used because {kernel.name} is forced"] * 2
    message = "cpu_int4 requires bfloat16 input; got float32; triton .*; slab can run it; reference can run it"
    with pytest.raises(LlmqError, match=message):
        choose(replace(PROBLEM, dtype=F32), 1, "cpu_int4", FOUR)
    with pytest.raises(LlmqError, match="kernel must be one of cpu_int4, triton, slab, reference; got 'marlin'"):
        choose(PROBLEM, 1, "marlin", FOUR)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_keeps_the_contract(kernel: Kernel) -> None:
    packed = packed_of(weight_of(32, 64, 32, 4, True))
    assert [other.name for other in KERNELS].count(kernel.name) == 1
    assert kernel.max_rows(PROBLEM) is None or kernel.max_rows(PROBLEM) > 0
    if kernel.refusal(problem_of(packed, BF16)):
        pytest.skip(f"{kernel.name} {kernel.refusal(problem_of(packed, BF16))}")
    bias, runtime = torch.arange(32, dtype=BF16), kernel.prepare(packed)
    assert runtime.out_features == 32
    assert any(isinstance(getattr(runtime, field.name), Tensor) for field in fields(runtime))
    assert torch.equal(kernel.run(torch.zeros(1, 64, dtype=BF16), runtime, bias)[0], bias)
    assert kernel.run(torch.zeros(0, 64, dtype=BF16), runtime).shape == (0, 32)
    x = torch.zeros(2, 64, dtype=BF16, requires_grad=True)
    kernel.run(x, runtime).sum().backward()
    assert x.grad is not None
    assert_near(x.grad, reference.dequantize(packed, torch.float64).sum(0).expand(2, 64), ROUNDED_TWICE)


@pytest.mark.parametrize("default", [F16, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_default_dtype_changes_nothing(symmetric: bool, bits: int, default: torch.dtype) -> None:
    packed = packed_of(weight_of(48, 96, 32, bits, symmetric))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(3)).to(BF16)

    def results() -> list[Tensor]:
        kernels = [kernel for kernel in KERNELS if kernel.refusal(problem_of(packed, BF16)) is None]
        assert {"slab", "reference"} <= {kernel.name for kernel in kernels}
        return [kernel.run(x, kernel.prepare(packed)) for kernel in kernels]

    expected, before = results(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = results()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
