"""Checkpoint layout <-> the runtime layout of the GPU kernels for 4 and 8 bits. Exact, reversible, torch on any device.

N is padded to rows of 64, K to columns of 128; what is padded has scale 0. With NT = N / 64 and KT = K / 128, rounded up:

    words    int32 [NT, KT, 64, 16]   tile by tile, each 4 KB in one piece. Word w of a tile's row holds, for p = 0 .. 3,
                                      the codes of columns 32 p + 2 w (bits 4p ..) and 32 p + 2 w + 1 (bits 16 + 4p ..):

        bits     31..28   27..24   23..20   19..16   15..12   11..8    7..4     3..0
        column   97+2w    65+2w    33+2w    1+2w     96+2w    64+2w    32+2w    2w

    of 8 bits: int32 [NT, KT, 128, 16], 8 KB a tile. Its first 64 rows are the words of columns 0 .. 63, the others those
                                      of 64 .. 127; p = 0 and 1 are their runs of 32 columns, in bits 8p .. and 16 + 8p ..

    scales   [groups, NT * 64]        in their dtype (16 bits); of every 16 rows in the order 0 8 1 9 2 10 .. 7 15, so that
                                      a word of 32 bits has rows r and r + 8, which one thread of a tensor core holds
    zeros    int16, like scales       codes; None when symmetric, where the zero point is 8 or 128

Neighbours along K share a word's two halves because they share a register in a tensor core's operand: a mask and an
`or` make both of them floats where they are. Run p of 32 columns is a group of 32, two runs are one of 64.

Layers that read the same input are concatenated along N by `torch.cat`: words along dimension 0, scales and zeros along
dimension 1 (`concatenate`), as long as every part but the last has whole tiles; K is split between tiles.

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

TILE_ROWS, TILE_COLUMNS = 64, 128
RUN = 32
BITS = (4, 8)


@dataclass(frozen=True)
class Tiled:
    """A weight [N, K] in the runtime layout. group_size: columns per scale, K per channel."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    columns: int
    bits: int
    group_size: int


def refusal(columns: int, group_size: int, bits: int, scale_dtype: torch.dtype) -> str | None:
    """Why a weight has no such layout (what follows a name in a sentence); None where it has one."""
    if bits not in BITS:
        return f"takes 4 and 8 bits; these weights have {bits}"
    if group_size != columns and group_size not in (32, 64) and group_size % TILE_COLUMNS:
        return f"takes groups of 32, 64, a multiple of 128, or one per channel; these have {group_size} columns"
    if scale_dtype not in (torch.float16, torch.bfloat16):
        return f"takes scales in float16 or bfloat16; these are {str(scale_dtype).removeprefix('torch.')}"
    return None


def groups_of(columns: int, group_size: int) -> int:
    """The groups of a row, those of padded columns included."""
    if group_size == columns:
        return 1
    return (
        -(-columns // TILE_COLUMNS) * TILE_COLUMNS // group_size if group_size < TILE_COLUMNS else columns // group_size
    )


def tile(packed: Packed) -> Tiled:
    """The runtime layout of stored tensors, on their device. `LlmqError` where `refusal` has a reason."""
    reason = refusal(packed.columns, packed.group_size, packed.bits, packed.scale.dtype)
    if reason:
        raise LlmqError(f"the tiled layout {reason}")
    codes, bits = unpack(packed.weight, packed.bits, packed.columns), packed.bits  # [N, K]
    down, across = -packed.rows % TILE_ROWS, -packed.columns % TILE_COLUMNS
    padded = pad(codes, (0, across, 0, down))
    runs = padded.view(-1, TILE_ROWS, padded.shape[1] // TILE_COLUMNS, 2, 2, 16, 2)  # [NT, 64, KT, i, j, w, half]
    if bits == 4:  # byte i of a half word has runs 2i and 2i + 1
        data = (runs[:, :, :, :, 0] | runs[:, :, :, :, 1] << 4).permute(0, 2, 1, 4, 5, 3)  # [NT, KT, 64, w, half, i]
    else:  # byte j of a half word of words i has run 2i + j
        data = runs.permute(0, 2, 3, 1, 5, 6, 4).flatten(2, 3)  # [NT, KT, i * 64, w, half, j]
    words = data.flatten(3).view(torch.int32)  # [NT, KT, 64 or 128, 16]
    zeros = None
    groups = groups_of(packed.columns, packed.group_size)
    if packed.zero is not None:
        zeros = _shuffle(unpack(packed.zero.T, bits, packed.rows).T.to(torch.int16), groups)
    scales = _shuffle(packed.scale, groups)
    return Tiled(words, scales, zeros, packed.rows, packed.columns, bits, packed.group_size)


def untile(tiled: Tiled) -> Packed:
    """The stored tensors: the inverse of `tile`."""
    row_tiles, column_tiles = tiled.words.shape[:2]
    rows, columns, bits = tiled.rows, tiled.columns, tiled.bits
    data = tiled.words.view(torch.uint8).view(row_tiles, column_tiles, -1, TILE_ROWS, 16, 2, 2)  # [.., w, half, byte]
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), -1).flatten(-2)  # [NT, KT, 1, 64, w, half, run]
    codes = data.permute(0, 3, 1, 2, 6, 4, 5).reshape(row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    groups = columns // tiled.group_size
    zero = None
    if tiled.zeros is not None:
        points = _unshuffle(tiled.zeros, rows, groups).to(torch.uint8)
        zero = pack(points.T.contiguous(), bits).T.contiguous()
    weight = pack(codes[:rows, :columns].contiguous(), bits)
    return Packed(rows, columns, bits, tiled.group_size, weight, _unshuffle(tiled.scales, rows, groups), zero)


def concatenate(parts: Sequence[Tiled]) -> Tiled:
    """The weight whose rows are those of all parts, one after the other. `LlmqError` where they cannot be one weight."""
    first = parts[0]
    for part in parts:
        alike = (part.columns, part.bits, part.group_size, part.scales.dtype, part.zeros is None)
        if alike != (first.columns, first.bits, first.group_size, first.scales.dtype, first.zeros is None):
            raise LlmqError(
                "layers must have the same in_features, bits, group size, scale dtype and symmetry to be one"
            )
    for part in parts[:-1]:
        if part.rows % TILE_ROWS:
            raise LlmqError(f"layers but the last must have out_features that {TILE_ROWS} divides; got {part.rows}")
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Tiled(
        torch.cat([part.words for part in parts]),
        torch.cat([part.scales for part in parts], 1),
        torch.cat(zeros, 1) if zeros else None,
        sum(part.rows for part in parts),
        first.columns,
        first.bits,
        first.group_size,
    )


def _shuffle(values: Tensor, groups: int) -> Tensor:
    """[N, G] -> [groups, NT * 64], rows r and r + 8 of every 16 beside each other, zeros where there is padding."""
    rows, found = values.shape
    padded = pad(values, (0, groups - found, 0, -rows % TILE_ROWS))
    return padded.T.reshape(groups, -1, 2, 8).transpose(2, 3).reshape(groups, -1).contiguous()


def _unshuffle(values: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `_shuffle`: [N, G]."""
    return (
        values.view(values.shape[0], -1, 8, 2)
        .transpose(2, 3)
        .reshape(values.shape[0], -1)[:groups, :rows]
        .T.contiguous()
    )
