"""The grid, packing and the quantized weight: every invariant, over random weights, widths and shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.core.grid import Grid, checked_scale, clipped_share, fit, grouped, quantize
from llmq.core.packing import pack, packed_width, unpack
from llmq.core.quantized import QuantizedWeight
from llmq.core.scheme import ActivationGrid, Scheme, scheme_of
from llmq.errors import LlmqError
from tests.fixtures import fit_full_range

BITS = (2, 3, 4, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, Grid, torch.dtype]:
    rows, groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.sampled_from((4, 8, 32)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, groups * size, generator=generator) * 10 ** draw(st.integers(-4, 3))
    weight = weight + draw(st.sampled_from((0.0, 3.0, -3.0))) * weight.std().nan_to_num(1.0)
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    if draw(st.booleans()):
        weight[:, :size] = 0  # a group of zeros
    grid = Grid(draw(st.sampled_from(BITS)), draw(st.sampled_from((None, size))), draw(st.booleans()))
    return weight, grid, draw(st.sampled_from(DTYPES))


def in_range(weight: torch.Tensor, quantized: QuantizedWeight) -> torch.Tensor:
    """Which weights lie between the values of the smallest and the largest code."""
    ends = [
        QuantizedWeight(
            torch.full_like(quantized.codes, code),
            quantized.scale,
            quantized.zero,
            quantized.group_size,
            quantized.bits,
        ).dequantize(torch.float32)
        for code in (0, (1 << quantized.bits) - 1)
    ]
    return (weight >= torch.minimum(*ends)) & (weight <= torch.maximum(*ends))


@given(weights())
@settings(max_examples=150, deadline=None)
def test_error_is_at_most_half_a_step_inside_the_range(case: tuple[torch.Tensor, Grid, torch.dtype]) -> None:
    weight, grid, dtype = case
    fits = [fit] if not grid.symmetric else [fit, fit_full_range]
    for choose in fits:
        scale, zero = choose(weight, grid, dtype)
        quantized = quantize(weight, scale, zero, grid)
        step = grouped(torch.zeros_like(weight), grid) + scale.float().abs().unsqueeze(-1)
        error = (weight - quantized.dequantize(torch.float32)).abs()
        bound = step.view(weight.shape) * (0.5 + 1e-5)
        assert bool((error <= bound)[in_range(weight, quantized)].all())
        assert bool((quantized.dequantize(torch.float32)[weight == 0] == 0).all()), "zero must map to zero"


@given(weights())
@settings(max_examples=100, deadline=None)
def test_codes_follow_the_weight_within_a_group(case: tuple[torch.Tensor, Grid, torch.dtype]) -> None:
    weight, grid, dtype = case
    for choose in (fit, fit_full_range) if grid.symmetric else (fit,):
        scale, zero = choose(weight, grid, dtype)
        codes = grouped(quantize(weight, scale, zero, grid).codes.float(), grid)
        order = grouped(weight, grid).argsort(-1)
        steps = codes.gather(-1, order).diff(dim=-1) * scale.float().sign().unsqueeze(-1)
        assert bool((steps >= 0).all()), "codes rise with the weight, and fall where the scale is negative"


@given(weights())
@settings(max_examples=60, deadline=None)
def test_scales_are_stored_finite_and_not_zero(case: tuple[torch.Tensor, Grid, torch.dtype]) -> None:
    weight, grid, dtype = case
    scale, zero = fit(weight, grid, dtype)
    assert scale.dtype == dtype
    assert bool(torch.isfinite(scale).all())
    assert bool((scale.abs() >= torch.finfo(dtype).tiny).all())
    assert (zero is None) == grid.symmetric


def test_full_range_gives_the_largest_weight_the_code_zero() -> None:
    weight = torch.tensor([[1.0, 0.2, -0.3, 0.1], [-2.0, 0.2, 1.3, 0.1]])
    grid = Grid(4, 4, symmetric=True)
    scale, _ = fit_full_range(weight, grid, torch.float32)
    quantized = quantize(weight, scale, None, grid)
    assert scale.flatten().tolist() == [-0.125, 0.25]
    assert quantized.codes[0, 0] == 0
    assert quantized.codes[1, 0] == 0
    assert quantized.dequantize()[0, 0] == 1.0


def test_asymmetric_covers_a_one_sided_group() -> None:
    weight = torch.linspace(0.0, 3.0, 16)[None]
    scale, zero = fit(weight, Grid(4, 16, symmetric=False), torch.float32)
    assert zero is not None
    assert zero.item() == 0
    assert torch.allclose(quantize(weight, scale, zero, Grid(4, 16, False)).dequantize(), weight, atol=1e-6)


def test_scale_that_overflows_its_dtype_is_refused() -> None:
    with pytest.raises(LlmqError, match="does not fit in torch.float16.*use bfloat16"):
        checked_scale(torch.tensor([1e6]), torch.float16)


def test_denormal_scale_is_raised_and_keeps_its_sign() -> None:
    stored = checked_scale(torch.tensor([1e-9, -1e-9, 0.0]), torch.float16)
    assert stored.tolist() == [torch.finfo(torch.float16).tiny, -torch.finfo(torch.float16).tiny, 1.0]


def test_group_size_must_divide() -> None:
    with pytest.raises(LlmqError, match="must divide in_features 10; got 4"):
        fit(torch.ones(2, 10), Grid(4, 4, True), torch.float32)


def test_clipped_share_counts_weights_past_the_ends() -> None:
    codes = torch.zeros(1, 4, dtype=torch.uint8)
    quantized = QuantizedWeight(codes, torch.ones(1, 1), None, 4, 4)
    assert clipped_share(torch.tensor([[-8.4, -8.6, 7.4, 7.6]]), quantized) == 0.5


def test_rows_take_a_stacked_weight_apart() -> None:
    weight, grid = torch.randn(6, 8), Grid(4, 4, False)
    whole = quantize(weight, *fit(weight, grid, torch.float32), grid)
    parts = torch.cat([whole.rows(0, 2).dequantize(), whole.rows(2, 6).dequantize()])
    assert torch.equal(parts, whole.dequantize())


@given(st.sampled_from(BITS), st.integers(0, 7), st.integers(1, 140), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_pack_and_unpack_are_exact(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, packed_width(count, bits))
    assert torch.equal(unpack(words, bits, count), codes)


@given(st.sampled_from(BITS), st.integers(1, 140), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_packed_bits_are_one_little_endian_stream(bits: int, count: int, seed: int) -> None:
    """The layout against big-integer arithmetic, which knows nothing of bytes."""
    codes = torch.randint(0, 1 << bits, (1, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    stream = sum(int(code) << (bits * index) for index, code in enumerate(codes[0]))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(packed_width(count, bits))]
    assert [int(w) & 0xFFFFFFFF for w in pack(codes, bits)[0]] == words


def test_unpack_refuses_a_wrong_width() -> None:
    with pytest.raises(LlmqError, match="33 codes of 4 bits need 5 words per row; got 4"):
        unpack(torch.zeros(1, 4, dtype=torch.int32), 4, 33)


def test_a_column_of_words_is_read_whatever_its_stride() -> None:
    """Zero points of 8 outputs and fewer are one row of words, read transposed."""
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    words = pack(codes, 4).T.clone(memory_format=torch.contiguous_format).T
    assert words.stride(-1) != 1
    assert torch.equal(unpack(words, 4, 8), codes)


def test_the_scheme_of_a_weight_states_its_grid_and_the_dtype_of_its_scales() -> None:
    weight = torch.randn(6, 8)
    for grid in (Grid(4, 4, False), Grid(3, None, True)):
        quantized = quantize(weight, *fit(weight, grid, torch.float16), grid)
        assert scheme_of(quantized) == Scheme(grid, None, torch.float16)


def test_a_weight_has_one_scale_per_row_and_group() -> None:
    codes = torch.zeros(3, 8, dtype=torch.uint8)
    with pytest.raises(LlmqError, match=r"scale must be \[3, 2\]; got \[1, 1\]"):
        QuantizedWeight(codes, torch.ones(1, 1), None, 4, 4)


def test_activation_grids_are_per_token_or_per_tensor() -> None:
    assert str(ActivationGrid(8, "token", symmetric=True, dynamic=True)) == "dynamic int8 per token"
    with pytest.raises(LlmqError, match="activation strategy must be one of token, tensor; got 'channel'"):
        ActivationGrid(8, "channel", symmetric=True, dynamic=True)
