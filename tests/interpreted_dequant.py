"""The dequantize kernel in Triton's interpreter, equal to the slab kernel to the bit. Run by `test_wna16.py` in its own process.

bfloat16 is tested for scales only: the interpreter truncates bfloat16 outputs where a GPU rounds.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmq.core.packing import pack
from llmq.errors import LlmqError
from llmq.kernels import dequant, slab
from llmq.kernels.problem import Packed

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SHAPES = [(1, 1, 1), (9, 37, 37), (13, 96, 32), (70, 640, 128), (5, 1100, 100), (33, 1056, 48), (3, 1536, 1536)]


def drawn(rows: int, columns: int, size: int, bits: int, symmetric: bool, scales: torch.dtype) -> Packed:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(rows, columns // size, generator=generator).to(scales)
    # float16's denormals are normal float32 numbers. bfloat16's are not, may be flushed, and `grid` stores none.
    scale[0, 0], scale[-1, -1] = torch.finfo(scales).smallest_normal / (4 if scales == F16 else 1), 0
    zero = None
    if not symmetric:
        points = torch.randint(0, 1 << bits, (columns // size, rows), generator=generator, dtype=torch.uint8)
        zero = pack(points, bits).T.contiguous()
    return Packed(rows, columns, bits, size, pack(codes, bits), scale, zero)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", dequant.BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_the_slab_kernel_to_the_bit(shape: tuple[int, int, int], bits: int, symmetric: bool) -> None:
    for scales, dtype in ((F16, F16), (F16, F32), (BF16, F32), (BF16, F16)):
        packed = drawn(*shape, bits, symmetric, scales)
        torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
        for start, stop in ((0, shape[0]), (shape[0] // 3, shape[0])):
            got = dequant.dequantize(packed, start, stop, dtype)
            assert torch.equal(got, slab.dequantize(packed, slab.zero_points(packed), start, stop, dtype))
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("bits", dequant.BITS)
def test_every_code_and_zero_point(bits: int) -> None:
    count = 1 << bits
    codes = torch.arange(count, dtype=torch.uint8).repeat(count, 1)  # [zero point, code]
    zero = pack(torch.arange(count, dtype=torch.uint8)[None], bits).T.contiguous()
    packed = Packed(count, count, bits, count, pack(codes, bits), torch.ones(count, 1, dtype=F16), zero)
    want = torch.arange(count)[None] - torch.arange(count)[:, None]
    assert torch.equal(dequant.dequantize(packed, 0, count, F16), want.to(F16))


def test_out_of_bounds_arguments_are_refused() -> None:
    packed = drawn(8, 64, 32, 4, False, F16)
    assert packed.zero is not None
    bad = [
        (replace(packed, bits=5), 8, F16, "bits must be one of"),
        (packed, 8, torch.float64, "dtypes float16, bfloat16 or float32"),
        (packed, 9, F16, "rows must be within 0 .. 8; got 0 .. 9"),
        (replace(packed, group_size=24), 8, F16, "group_size must divide in_features 64; got 24"),
        (replace(packed, weight=packed.weight[:, ::2]), 8, F16, "weight must be contiguous torch.int32"),
        (replace(packed, scale=packed.scale[:4]), 8, F16, "scale must be contiguous torch.float16"),
        (replace(packed, zero=packed.zero.long()), 8, F16, "zero must be contiguous torch.int32"),
        (replace(packed, scale=packed.scale.to("meta")), 8, F16, "all tensors must be on one device"),
    ]
    for weight, stop, dtype, message in bad:
        with pytest.raises(LlmqError, match=message):
            dequant.dequantize(weight, 0, stop, dtype)
    assert dequant.dequantize(packed, 4, 4, F16).shape == (0, 64)
    assert not dequant.takes(packed, F16), "on the CPU torch unpacks"


@pytest.mark.parametrize("bits", dequant.BITS)
def test_the_slab_kernel_uses_it_if_it_can(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = drawn(70, 96, 32, bits, False, F16), torch.randn(5, 96, dtype=F16)
    x.requires_grad_()
    results = []
    for fused in (False, True):
        monkeypatch.setattr(dequant, "takes", lambda packed, dtype, fused=fused: fused)
        monkeypatch.setattr(slab, "SLAB", 96 * 20)
        monkeypatch.setattr(slab, "GPU_SLAB", 96 * 20)
        y = slab.run(x, packed)
        results.append((y, *torch.autograd.grad(y.float().sum(), x)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
