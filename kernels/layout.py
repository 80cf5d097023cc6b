"""Checkpoint layout <-> runtime layout of the GPU kernels for 4 and 8 bits. Exact, reversible, in torch on any device.

N is padded to a multiple of 64 and K to a multiple of 128; padding has scale 0. With NT = ceil(N / 64), KT = ceil(K / 128):

    words    int32 [NT, KT, 64, 16]   4 bits, one contiguous 4 KB tile after the other. Word w of a tile's row holds, for
                                      p = 0 .. 3, the codes of columns 32 p + 2 w (at bit 4 p) and 32 p + 2 w + 1 (at bit
                                      16 + 4 p):

        bits     31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
        column   97+2w    65+2w    33+2w    1+2w     96+2w    64+2w    32+2w    2w

             int32 [NT, KT, 128, 16]  8 bits, 8 KB a tile. The first 64 rows are the words of columns 0 .. 63, the others
                                      those of columns 64 .. 127; p = 0 and 1 are their runs of 32 columns, at bits 8 p and
                                      16 + 8 p

    scales   [groups, NT * 64]        in their dtype (16 bits). Every 16 rows are stored in the order 0 8 1 9 2 10 .. 7 15,
                                      so that one 32-bit word holds rows r and r + 8, which one tensor-core thread holds
    zeros    int16, ordered like scales   zero-point codes; None if symmetric, where the zero point is 8 or 128

Neighbours along K share the two halves of a word because they share a register of a tensor core's operand: a mask and an
`or` turn both into floats in place. A run of 32 columns is a group of 32; two runs are a group of 64.

Layers that read the same input are concatenated along N by `torch.cat` (`concatenate`): words along dimension 0, scales and
zeros along dimension 1. Every part but the last must fill its tiles. K is split between tiles.

Left out: other widths. 2 and 3 bits are dequantized slab by slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmq.core.packing import pack, unpack
from llmq.errors import LlmqError
from llmq.kernels.problem import Packed

TILE_N, TILE_K = 64, 128
RUN = 32
BITS = (4, 8)


@dataclass(frozen=True)
class Tiled:
    """A weight [N, K] in the runtime layout."""

    words: Tensor
    """int32 [NT, KT, 16 * bits, 16]."""
    scales: Tensor
    """[groups, NT * 64] in the stored scales' dtype."""
    zeros: Tensor | None
    """int16 [groups, NT * 64]; None if symmetric."""
    out_features: int
    """N."""
    in_features: int
    """K."""
    bits: int
    """4 or 8."""
    group_size: int
    """Columns that share one scale; K for one scale per channel."""


def refusal(in_features: int, group_size: int, bits: int, scale_dtype: torch.dtype) -> str | None:
    """The reason why a weight has no such layout, worded to follow a name in a sentence; None if it has one."""
    if bits not in BITS:
        return f"requires 4 or 8 bits; got {bits}"
    if group_size != in_features and group_size not in (32, 64) and group_size % TILE_K:
        return f"requires group_size 32, 64, a multiple of 128, or one group per channel; got {group_size}"
    if scale_dtype not in (torch.float16, torch.bfloat16):
        return f"requires float16 or bfloat16 scales; got {str(scale_dtype).removeprefix('torch.')}"
    return None


def groups_of(in_features: int, group_size: int) -> int:
    """Groups of a row, padded columns included."""
    if group_size == in_features:
        return 1
    if group_size < TILE_K:
        return -(-in_features // TILE_K) * TILE_K // group_size
    return in_features // group_size


def tile(packed: Packed) -> Tiled:
    """Stored tensors -> the runtime layout, on their device. Raises `LlmqError` if `refusal` gives a reason."""
    reason = refusal(packed.in_features, packed.group_size, packed.bits, packed.scale.dtype)
    if reason:
        raise LlmqError(f"the tiled layout {reason}")
    codes, bits = unpack(packed.weight, packed.bits, packed.in_features), packed.bits  # [N, K]
    down, across = -packed.out_features % TILE_N, -packed.in_features % TILE_K
    padded = pad(codes, (0, across, 0, down))
    runs = padded.view(-1, TILE_N, padded.shape[1] // TILE_K, 2, 2, 16, 2)  # [NT, 64, KT, i, j, w, half]
    if bits == 4:  # byte i of a half word holds runs 2i and 2i + 1
        data = (runs[:, :, :, :, 0] | runs[:, :, :, :, 1] << 4).permute(0, 2, 1, 4, 5, 3)  # [NT, KT, 64, w, half, i]
    else:  # byte j of a half word of words i holds run 2i + j
        data = runs.permute(0, 2, 3, 1, 5, 6, 4).flatten(2, 3)  # [NT, KT, i * 64, w, half, j]
    words = data.flatten(3).view(torch.int32)  # [NT, KT, 64 or 128, 16]
    zeros = None
    groups = groups_of(packed.in_features, packed.group_size)
    if packed.zero is not None:
        zeros = _shuffle(unpack(packed.zero.T, bits, packed.out_features).T.to(torch.int16), groups)
    scales = _shuffle(packed.scale, groups)
    return Tiled(words, scales, zeros, packed.out_features, packed.in_features, bits, packed.group_size)


def untile(tiled: Tiled) -> Packed:
    """The runtime layout -> stored tensors: the inverse of `tile`."""
    row_tiles, column_tiles = tiled.words.shape[:2]
    n, k, bits = tiled.out_features, tiled.in_features, tiled.bits
    data = tiled.words.view(torch.uint8).view(row_tiles, column_tiles, -1, TILE_N, 16, 2, 2)  # [.., w, half, byte]
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), -1).flatten(-2)  # [NT, KT, 1, 64, w, half, run]
    codes = data.permute(0, 3, 1, 2, 6, 4, 5).reshape(row_tiles * TILE_N, column_tiles * TILE_K)
    groups = k // tiled.group_size
    zero = None
    if tiled.zeros is not None:
        points = _unshuffle(tiled.zeros, n, groups).to(torch.uint8)
        zero = pack(points.T.contiguous(), bits).T.contiguous()
    weight = pack(codes[:n, :k].contiguous(), bits)
    return Packed(n, k, bits, tiled.group_size, weight, _unshuffle(tiled.scales, n, groups), zero)


def concatenate(parts: Sequence[Tiled]) -> Tiled:
    """The weight whose rows are the rows of all parts, in order. Raises `LlmqError` if they cannot be one weight."""
    first = parts[0]
    for part in parts:
        properties = (part.in_features, part.bits, part.group_size, part.scales.dtype, part.zeros is None)
        if properties != (first.in_features, first.bits, first.group_size, first.scales.dtype, first.zeros is None):
            raise LlmqError(
                "concatenated layers must have the same in_features, bits, group_size, scale dtype and symmetry"
            )
    for part in parts[:-1]:
        if part.out_features % TILE_N:
            raise LlmqError(
                f"out_features must be divisible by {TILE_N} for every layer but the last; got {part.out_features}"
            )
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Tiled(
        torch.cat([part.words for part in parts]),
        torch.cat([part.scales for part in parts], 1),
        torch.cat(zeros, 1) if zeros else None,
        sum(part.out_features for part in parts),
        first.in_features,
        first.bits,
        first.group_size,
    )


def _shuffle(values: Tensor, groups: int) -> Tensor:
    """[N, G] -> [groups, NT * 64]: rows r and r + 8 of every 16 side by side, zeros as padding."""
    n, stored_groups = values.shape
    padded = pad(values, (0, groups - stored_groups, 0, -n % TILE_N))
    return padded.T.reshape(groups, -1, 2, 8).transpose(2, 3).reshape(groups, -1).contiguous()


def _unshuffle(values: Tensor, n: int, groups: int) -> Tensor:
    """The inverse of `_shuffle`: [N, G]."""
    return (
        values.view(values.shape[0], -1, 8, 2).transpose(2, 3).reshape(values.shape[0], -1)[:groups, :n].T.contiguous()
    )
