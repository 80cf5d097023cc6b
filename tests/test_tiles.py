"""The runtime layout of the GPU kernels: the place of every code, lossless conversion, concatenation of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import LlmqError
from llmq.kernels import layout
from llmq.kernels.problem import Packed
from tests.fixtures import drawn


def assert_same(a: Packed, b: Packed) -> None:
    assert (a.out_features, a.in_features, a.bits) == (b.out_features, b.in_features, b.bits)
    assert a.group_size == b.group_size
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.scale, b.scale)
    assert (a.zero is None) == (b.zero is None)
    assert a.zero is None or b.zero is None or torch.equal(a.zero, b.zero)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 12),
    st.sampled_from([32, 64, 128, 256, None]),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 99),
    st.sampled_from(layout.BITS),
)
def test_tile_and_untile_are_inverse(
    rows: int, groups: int, size: int | None, symmetric: bool, dtype: torch.dtype, seed: int, bits: int
) -> None:
    columns = 13 * groups if size is None else size * groups
    packed = drawn(rows, columns, size or columns, symmetric, dtype, seed, bits)
    tiled = layout.tile(packed)
    tiles = -(-rows // 64), -(-columns // 128)
    assert tiled.words.shape == (*tiles, 16 * bits, 16)
    assert tiled.words.dtype == torch.int32
    assert tiled.words.is_contiguous()
    assert tiled.scales.shape == (layout.groups_of(columns, packed.group_size), tiles[0] * 64)
    assert_same(layout.untile(tiled), packed)


@pytest.mark.parametrize("bits", layout.BITS)
def test_every_code_is_where_the_docstring_says(bits: int) -> None:
    packed = drawn(70, 200, 200, False, torch.float16, bits=bits)
    tiled, most = layout.tile(packed), (1 << bits) - 1
    codes = [
        [(int(word) >> (bits * i)) & most for word in row for i in range(32 // bits)] for row in packed.weight.tolist()
    ]
    for n in range(70):
        for k in range(200):
            p, rest = divmod(k % 128, 32)
            half, p = (0, p) if bits == 4 else divmod(p, 2)
            word = int(tiled.words[n // 64, k // 128, 64 * half + n % 64, rest // 2])
            assert (word >> (bits * p + 16 * (rest % 2))) & most == codes[n][k]
    for n in range(70):
        at = n // 16 * 16 + 2 * (n % 8) + n % 16 // 8
        assert tiled.scales[0, at] == packed.scale[n, 0]
        assert tiled.zeros is not None
        word, shift = n * bits // 32, n * bits % 32
        assert int(tiled.zeros[0, at]) == (int(packed.zero[word, 0]) >> shift) & most  # type: ignore[index]


def test_padding_has_scale_zero() -> None:
    tiled = layout.tile(drawn(3, 160, 32, True, torch.bfloat16))
    assert tiled.scales.shape == (8, 64)
    assert int((tiled.scales != 0).sum()) == 3 * 5


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_concatenate_along_rows(symmetric: bool, bits: int) -> None:
    parts = [drawn(rows, 256, 64, symmetric, torch.float16, rows, bits) for rows in (128, 64, 70)]
    got = layout.untile(layout.concatenate([layout.tile(part) for part in parts]))
    assert torch.equal(got.weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(got.scale, torch.cat([part.scale for part in parts]))
    with pytest.raises(LlmqError, match="out_features must be divisible by 64 for every layer but the last; got 70"):
        layout.concatenate([layout.tile(part) for part in (parts[2], parts[0])])
    others = (
        drawn(64, 256, 32, symmetric, torch.float16, bits=bits),
        drawn(64, 256, 64, symmetric, torch.float16, bits=12 - bits),
    )
    for other in others:
        with pytest.raises(LlmqError, match="same in_features, bits, group_size"):
            layout.concatenate([layout.tile(parts[0]), layout.tile(other)])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 3}, "requires 4 or 8 bits; got 3"),
        ({"group_size": 48}, "requires group_size 32, 64, a multiple of 128, or one group per channel; got 48"),
        ({"scale_dtype": torch.float32}, "requires float16 or bfloat16 scales; got float32"),
    ],
)
def test_refusals_state_rule_and_value(change: dict[str, object], reason: str) -> None:
    arguments = {"in_features": 192, "group_size": 64, "bits": 4, "scale_dtype": torch.float16}
    assert layout.refusal(**arguments) is None  # type: ignore[arg-type]
    assert layout.refusal(**arguments | change) == reason  # type: ignore[arg-type]
