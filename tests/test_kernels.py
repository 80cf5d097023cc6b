"""Packed matmuls: the reference against float64 on its own unpack, every kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from llmq.core.grid import Grid, fit, fit_full_range, quantize
from llmq.core.packing import pack
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors as ct
from llmq.kernels import cpu_int4, reference, slab
from llmq.kernels.problem import Packed, Problem
from llmq.kernels.registry import KERNELS, choose

CASES = [
    (rows, groups, size, bits, symmetric)
    for rows, groups in ((32, 2), (48, 3), (5, 1))
    for size in (32, 64, None)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
]


def problem(rows: int, groups: int, size: int | None, bits: int, symmetric: bool, dtype: torch.dtype) -> Packed:
    """A packed weight with scales of both signs, one of them the smallest normal number."""
    grid, columns = Grid(bits, size, symmetric), groups * (size or 96)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + bits))
    scale, zero = (fit_full_range if symmetric else fit)(weight, grid, torch.bfloat16)
    scale[0, 0] = torch.finfo(torch.bfloat16).tiny
    tensors = ct.encode(quantize(weight, scale, zero, grid))
    asked = Problem(rows, columns, bits, size or columns, symmetric, dtype, "cpu")
    return Packed(asked, tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point"))


def dense(packed: Packed) -> torch.Tensor:
    return reference.dequantize(packed, torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_references_own_unpack_inverts_pack(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 45), dtype=torch.uint8)
    assert torch.equal(reference.unpack(pack(codes, bits), bits, 45), codes.long())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda module: module.NAME)
def test_kernels_equal_float64(kernel, case) -> None:  # type: ignore[no-untyped-def]
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        packed = problem(*case, dtype)
        if kernel.refusal(packed.problem):
            continue
        for rows in (0, 1, 7, 40):
            x = torch.randn(rows, packed.problem.columns, dtype=dtype)
            got = kernel.run(x, kernel.prepare(packed))
            want = x.double() @ dense(packed).T
            assert got.dtype == dtype
            assert got.shape == want.shape
            scale = want.abs().max() if rows else 1.0
            assert rows == 0 or bool(((got.double() - want).abs().max() / scale) < tolerance)


def test_slabs_cover_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = problem(48, 3, 32, 4, False, torch.float32)
    x = torch.randn(4, 96)
    whole = slab.run(x, packed)
    monkeypatch.setattr(slab, "SLAB", 7 * 96)
    torch.testing.assert_close(slab.run(x, packed), whole)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 8}, "takes 4 bits, not 8"),
        ({"symmetric": False}, "symmetric"),
        ({"group_size": 96}, "takes groups of 32, 64, 128, 256, not 96"),
        ({"rows": 20}, "16 divides, not 20"),
        ({"device": "cuda"}, "runs on the CPU, not on cuda"),
        ({"dtype": torch.float64}, "not torch.float64"),
    ],
)
def test_refusals_state_rule_and_value(change: dict[str, object], reason: str) -> None:
    values = {"rows": 32, "columns": 192, "bits": 4, "group_size": 64, "symmetric": True}
    asked = Problem(**{**values, "dtype": torch.float32, "device": "cpu", **change})  # type: ignore[arg-type]
    found = cpu_int4.refusal(asked)
    assert found is not None
    assert reason in found
    choice = choose(asked, 1)
    assert choice.kernel is slab
    assert choice.refused == (("cpu_int4", found),)


def test_the_number_of_rows_decides() -> None:
    asked = Problem(32, 192, 4, 64, True, torch.float32, "cpu")
    assert choose(asked, cpu_int4.MOST_ROWS).kernel is cpu_int4
    assert choose(asked, cpu_int4.MOST_ROWS + 1).kernel is slab
    assert choose(asked, 10**6, kernel="cpu_int4").kernel is cpu_int4


def test_a_forced_kernel_that_refuses_is_an_error_with_all_reasons() -> None:
    asked = Problem(32, 192, 8, 64, True, torch.float32, "cpu")
    with pytest.raises(LlmqError, match="cpu_int4 takes 4 bits, not 8; slab cpu_int4 was asked for"):
        choose(asked, 1, kernel="cpu_int4")
