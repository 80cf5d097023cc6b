"""The few-rows kernel in Triton's interpreter, compared with float64. Run by `test_wna16.py` in its own process.

float16 uses the portable unpacking that GPUs without PTX use. bfloat16 uses the `upcast` form: the interpreter computes with
the bit patterns of bfloat16, and truncates where a GPU rounds. Assembly, bfloat16 arithmetic and two programs that count
their arrival at the same time run on a GPU only (`test_gpu.py`); `test_assembly.py` executes the assembly's text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.errors import LlmqError
from llmq.kernels import layout, reference, slab, wna16
from llmq.kernels._unpack import beside4, pairs
from llmq.kernels.launch import Launch
from llmq.kernels.problem import Packed
from tests.fixtures import drawn

F16, BF16 = torch.float16, torch.bfloat16
FORMS = {F16: "portable", BF16: "upcast"}
ROUNDING = {F16: 2**-10, BF16: 2**-7}
SHAPES = [  # M, N, K, group
    (1, 64, 128, 128),
    (3, 70, 160, 32),
    (9, 130, 320, 64),
    (17, 65, 384, 128),
    (2, 33, 512, 256),
    (5, 1, 100, 100),
    (7, 19, 37, 37),
    (70, 128, 256, 64),
]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN, y and partial sums included
    yield
    torch.use_deterministic_algorithms(False)


def launch(rows: int, dtype: torch.dtype, split: int = 1, bn: int = 64) -> Launch:
    return Launch(8 if rows <= 8 else 16, bn, 4, 3, split, FORMS[dtype])


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) + 0.3).to(dtype)


def assert_right(y: Tensor, x: Tensor, packed: Packed, bias: Tensor | None = None) -> None:
    """Equal to the reference in float64 up to one rounding of y and the kernel's order of float32 sums."""
    weight = reference.dequantize(packed, torch.float64)
    want = reference.run(x.double(), packed, None if bias is None else bias.double(), torch.float64)
    size = x.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    # Near zero the error is that of denormals: float16 rounds to them, bfloat16 may lose them.
    tiny = torch.finfo(y.dtype).smallest_normal * (2**-10 if y.dtype == F16 else 1)
    assert bool(((y.double() - want).abs() <= want.abs() * ROUNDING[y.dtype] + size * 2**-20 + tiny).all())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_any_shape_equals_the_reference(bits: int, shape: tuple[int, ...], dtype: torch.dtype, symmetric: bool) -> None:
    rows, out, columns, size = shape
    packed = drawn(out, columns, size, symmetric, dtype, bits=bits)
    packed.scale[0, 0] = 0
    # float16's denormals are normal float32 numbers. bfloat16's are not, are flushed on GPUs, and `grid` stores none.
    packed.scale[-1, -1] = torch.finfo(dtype).smallest_normal / (4 if dtype == F16 else 1)
    tiled = wna16.prepare(packed)
    x, bias = inputs(rows, columns, dtype), inputs(1, out, dtype)[0]
    for split, with_bias in ((1, False), (1, True), (2, False), (3, True)) if bits == 4 else ((1, False), (3, True)):
        added = bias if with_bias else None
        y = wna16.multiply(x, tiled, added, launch(rows, dtype, split))
        assert_right(y, x, packed, added)
    assert torch.equal(y, wna16.multiply(x, tiled, added, launch(rows, dtype, split))), "counters are zero again"


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_code_and_zero_point_is_exact(bits: int, size: int, symmetric: bool) -> None:
    packed, most = drawn(64, 256, size, symmetric, F16, bits=bits), (1 << bits) - 1
    packed.scale[:] = 2.0 ** torch.randint(-3, 4, packed.scale.shape)
    assert set(reference.unpack(packed.weight, bits, 256).flatten().tolist()) == set(range(most + 1))
    if packed.zero is not None:
        packed.zero[0] = -1 << 32 - bits  # zero points 0 for all rows but one, which has the largest
        assert {0, most} <= set(reference.unpack(packed.zero.T, bits, 64).flatten().tolist())
    x = torch.eye(256, dtype=F16)
    assert torch.equal(wna16.multiply(x, wna16.prepare(packed)).T, reference.dequantize(packed).to(F16))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("scales", "dtype"), [(F16, F16), (BF16, F16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (70, 70, 160, 32, 64),
        (66, 130, 320, 64, 64),
        (130, 65, 384, 128, 128),
        (129, 33, 512, 256, 128),
        (140, 70, 160, 32, 128),
        (131, 40, 37, 37, 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", layout.BITS)
def test_large_blocks_use_the_weights_of_the_slab_kernel(
    bits: int, shape: tuple[int, ...], scales: torch.dtype, dtype: torch.dtype, symmetric: bool
) -> None:
    rows, out, columns, size, bm = shape
    packed = drawn(out, columns, size, symmetric, scales, bits=bits)
    packed.scale[0, 0] = 0
    x, bias = inputs(rows, columns, dtype), inputs(1, out, dtype)[0]
    tiled = wna16.prepare(packed)
    folded = size < columns
    exact = folded and FORMS[dtype] == "portable"  # otherwise scales multiply float32 sums or float32 weights
    weight = slab.dequantize(packed, slab.zero_points(packed), 0, out, dtype if exact else torch.float32).double()
    want = x.double() @ weight.T + bias.double()
    size_of = x.double().abs() @ weight.abs().T + bias.double().abs()
    y = wna16.multiply(x, tiled, bias, Launch(bm, 64, 4, 3, 1 if symmetric else 2, FORMS[dtype]))
    tiny = torch.finfo(dtype).smallest_normal
    assert bool(((y.double() - want).abs() <= want.abs() * ROUNDING[dtype] + size_of * 2**-20 + tiny).all())


@triton.jit
def _unpacked(words, zeros, out, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    rows = tl.arange(0, 64)[:, None]
    at = words + rows * 16 + tl.arange(0, 16)[None, :]
    q, more, z = tl.load(at), tl.load(at + (0 if BITS == 4 else 1024)), tl.load(zeros + rows)
    codes = beside4(*pairs(q, more, z, z, z, z, BITS, tl.bfloat16, SYMMETRIC, "portable"))
    tl.store(out + rows * 128 + tl.arange(0, 128)[None, :], codes.to(tl.int16, bitcast=True))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", layout.BITS)
def test_bfloat16_is_unpacked_without_bfloat16_arithmetic(bits: int, symmetric: bool) -> None:
    """What AMD runs: exact even where bfloat16 cannot be added."""
    packed = drawn(64, 128, 128, False, BF16, bits=bits)
    points = reference.unpack(packed.zero.T, bits, 64).T.to(torch.int32)  # type: ignore[union-attr]
    out = torch.empty(64, 128, dtype=torch.int16)
    _unpacked[(1,)](layout.tile(packed).words, points * 0x10001, out, BITS=bits, SYMMETRIC=symmetric)
    want = reference.unpack(packed.weight, bits, 128) - (packed.middle if symmetric else points)
    assert torch.equal(out.view(BF16), want.to(BF16))


@pytest.mark.parametrize("bits", layout.BITS)
def test_wide_blocks_are_bit_equal(bits: int) -> None:
    packed, x = drawn(256, 384, 128, False, F16, bits=bits), inputs(5, 384, F16)
    tiled = wna16.prepare(packed)
    assert torch.equal(
        wna16.multiply(x, tiled, None, launch(5, F16, 2, 64)), wna16.multiply(x, tiled, None, launch(5, F16, 2, 128))
    )
    odd = wna16.prepare(drawn(192, 128, 128, True, F16))
    with pytest.raises(LlmqError, match="bn must divide the padded out_features 192; got 128; use 64"):
        wna16.multiply(inputs(1, 128, F16), odd, None, launch(1, F16, 1, 128))


@pytest.mark.parametrize("default", [F16, BF16, torch.float64], ids=str)
def test_split_k_does_not_use_the_default_dtype(default: torch.dtype) -> None:
    packed, x = drawn(70, 640, 128, False, F16), inputs(3, 640, F16)
    tiled, configuration = wna16.prepare(packed), launch(3, F16, split=2)
    expected = wna16.multiply(x, tiled, None, configuration)
    torch.set_default_dtype(default)
    try:
        got = wna16.multiply(x, tiled, None, configuration)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


def test_the_launcher_can_be_replaced() -> None:
    tiled, x, calls = wna16.prepare(drawn(70, 160, 32, True, F16)), inputs(6, 160, F16), []
    wna16.multiply(x, tiled, launcher=lambda *arguments: calls.append(arguments))
    ((aligned, weight, bias, y, configuration),) = calls
    assert (weight, bias, y.shape) == (tiled, None, (6, 70))
    assert torch.equal(aligned, x)
    assert configuration == wna16.configuration(tiled, 6, F16, x.device)


def test_no_rows_and_any_strides() -> None:
    packed = drawn(70, 160, 32, True, F16)
    tiled = wna16.prepare(packed)
    assert wna16.run(torch.empty(0, 160, dtype=F16), tiled).shape == (0, 70)
    x = inputs(6, 160, F16)
    want = wna16.run(x, tiled)
    for other in (torch.cat((x, x), 1)[:, :160], x.T.contiguous().T, torch.cat((x[:, :3], x), 1)[:, 3:]):
        assert torch.equal(wna16.run(other, tiled), want)
    assert torch.equal(wna16.run(x[:1], tiled), wna16.run(torch.cat((x[:1, :5], x[:1]), 1)[:, 5:], tiled))


def test_concatenated_layers_are_bit_equal() -> None:
    parts = [wna16.prepare(drawn(rows, 256, 64, False, F16, rows)) for rows in (128, 64, 70)]
    x = inputs(3, 256, F16)
    assert torch.equal(wna16.run(x, layout.concatenate(parts)), torch.cat([wna16.run(x, part) for part in parts], 1))


@pytest.mark.parametrize("bits", layout.BITS)
def test_gradients_and_opcheck(bits: int) -> None:
    packed = drawn(70, 160, 32, False, F16, bits=bits)
    packed.scale.div_(packed.middle / 8)
    tiled, x = wna16.prepare(packed), inputs(3, 160, F16).requires_grad_()
    wna16.run(x, tiled).float().sum().backward()
    want = torch.ones(3, 70, dtype=torch.float64) @ reference.dequantize(packed, torch.float64)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-2, atol=5e-2)  # of sums of 70 rounded weights
    (first,) = torch.autograd.grad(wna16.run(x, tiled).float().pow(2).sum() / 64, x, create_graph=True)
    (second,) = torch.autograd.grad(first.float().sum(), x)
    dense = reference.dequantize(packed, torch.float64)
    want = (dense.sum(1) @ dense / 32).expand(3, -1)
    assert (second.double() - want).norm() < 2e-2 * want.norm()
    arguments = (tiled.words, tiled.scales, tiled.zeros, None, 70, 160, bits, 32)
    torch.use_deterministic_algorithms(False)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.llmq.wna16_linear.default, (x, *arguments), test_utils=checks)


def test_invalid_arguments_are_refused_before_a_launch() -> None:
    packed = drawn(64, 128, 32, False, F16)
    tiled, x = wna16.prepare(packed), inputs(2, 128, F16)
    assert tiled.zeros is not None
    bad = [
        (x[:, 1:], tiled, None, r"x must be \[M, 128\]; got \[2, 127\]"),
        (x.float(), tiled, None, "x must be float16 or bfloat16; got torch.float32; cast it"),
        (x, replace(tiled, words=tiled.words[:, :, :, ::2]), None, "words must be contiguous torch.int32"),
        (x, replace(tiled, scales=tiled.scales[:1]), None, r"scales must be contiguous torch.float16 \[4, 64\]"),
        (x, replace(tiled, zeros=tiled.zeros.int()), None, "zeros must be contiguous torch.int16"),
        (x, replace(tiled, words=tiled.words.to("meta")), None, "x is on cpu, words on meta"),
        (x, tiled, torch.zeros(63, dtype=F16), r"bias must be contiguous torch.float16 \[64\]"),
        (x, tiled, torch.zeros(64), "bias must be contiguous torch.float16"),
        (x[0], tiled, None, r"x must be \[M, 128\]; got \[128\]"),
        (
            x,
            replace(tiled, group_size=48),
            None,
            "requires group_size 32, 64, a multiple of 128, or one group per channel",
        ),
        (x, replace(tiled, group_size=64), None, "scales must be contiguous"),
        (x, replace(tiled, bits=8), None, r"words must be contiguous torch.int32 \[1, 1, 128, 16\]"),
        (x, replace(tiled, bits=3), None, "requires 4 or 8 bits; got 3"),
        (x, replace(tiled, scales=tiled.scales.float()), None, "requires float16 or bfloat16 scales"),
        (x, replace(tiled, out_features=65), None, "words must be contiguous"),
    ]
    for rows, weight, bias, message in bad:
        with pytest.raises(LlmqError, match=message):
            wna16.multiply(rows, weight, bias)
    packed.scale[3, 1] = float("inf")
    with pytest.raises(LlmqError, match="scales must be finite; row 3, group 1 has inf"):
        wna16.prepare(packed)


def test_32_bit_offsets_are_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled, x = wna16.prepare(drawn(64, 128, 32, True, F16)), inputs(4, 256, F16)[:, :128]
    assert wna16._aligned(x) is x
    want = wna16.run(x, tiled)
    monkeypatch.setattr(wna16, "MAX_STRIDE", 200)
    assert wna16._aligned(x).stride() == (128, 1), "rows with a large stride are copied"
    assert torch.equal(wna16.run(x, tiled), want)
    monkeypatch.setattr(wna16, "MAX_STRIDE", 100)
    with pytest.raises(LlmqError, match="in_features must be below 100 and scales below 2"):
        wna16.run(x, tiled)
