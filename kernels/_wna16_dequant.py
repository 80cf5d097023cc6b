"""Device code: some rows of a weight in the checkpoint's layout -> dense rows, for 2, 3, 4 or 8 bits.

    program (BN rows, 512 columns)

A row is a little-endian stream of codes (`llmq.core.packing`). A unit is the fewest whole words that codes fill: one word has
32 / BITS codes, three words have 32 codes of 3 bits, of which the 11th and the 22nd straddle two words. A thread unpacks the
words of a unit in its own registers and then writes neighbouring columns.

(code - zero) * scale is computed in float32, where it is exact, and rounded once to out's dtype: the same bits as
`llmq.kernels.slab.dequantize`. Integers become floats without a conversion: 0x4B000000 | n is 2**23 + n in float32, and the
difference of two of them is exact. This is plain Triton for every GPU and the interpreter: the time is that of writing 2 bytes
per weight, so assembly would save nothing.
"""

import triton
import triton.language as tl

ROWS, WARPS = 8, 4


@triton.jit
def _field(low, following, shift, BITS: tl.constexpr):
    """BITS bits of the words `low` starting at bit `shift`; bits beyond the word's end come from the words `following`."""
    if BITS == 3:
        over = tl.where(shift > 29, 32 - shift, 3)
        first = (low >> shift) & ((1 << over) - 1)
        return (first | tl.where(shift > 29, following << over, 0)) & 7
    else:
        return (low >> shift) & ((1 << BITS) - 1)


@triton.jit
def _float(codes):
    """2**23 + code in float32."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _codes(words, width, unit, rows_ok, BITS: tl.constexpr, UNIT: tl.constexpr):
    """words: pointers to rows [BN, 1] -> codes [BN, units, UNIT], 0 beyond a row's end."""
    shift = tl.arange(0, UNIT)[None, None, :] * BITS
    if BITS == 3:
        at = words + 3 * unit[None, :]
        w0 = tl.load(at, mask=rows_ok & (3 * unit < width)[None, :], other=0)[:, :, None]
        w1 = tl.load(at + 1, mask=rows_ok & (3 * unit + 1 < width)[None, :], other=0)[:, :, None]
        w2 = tl.load(at + 2, mask=rows_ok & (3 * unit + 2 < width)[None, :], other=0)[:, :, None]
        low = tl.where(shift < 32, w0, tl.where(shift < 64, w1, w2))
        return _field(low, tl.where(shift < 32, w1, w2), shift % 32, 3)
    else:
        w0 = tl.load(words + unit[None, :], mask=rows_ok & (unit < width)[None, :], other=0)
        return _field(w0[:, :, None], 0, shift, BITS)


@triton.jit
def wna16_dequant(
    words, scales, zeros, out, first, N, K, width, groups,
    BN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """words [N, width], scales [N, groups], zeros [.., groups] -> out [N, K]. Row 0 is row `first` of the zero points.

    GROUP: columns per scale, 0 per channel.
    """
    UNIT: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    unit = tl.program_id(1) * (512 // UNIT) + tl.arange(0, 512 // UNIT)
    rows_ok = (row < N)[:, None]
    codes = _codes(words + row.to(tl.int64)[:, None] * width, width, unit, rows_ok, BITS, UNIT)  # [BN, units, UNIT]
    k = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]  # [units, UNIT]
    if GROUP == 0:
        group = tl.zeros((1, 1, 1), tl.int32)
    elif GROUP % UNIT == 0:
        group = (unit * UNIT // GROUP)[None, :, None]
    else:
        group = (k // GROUP)[None, :, :]
    meta_ok = rows_ok[:, :, None] & (group < groups)
    scale = tl.load(scales + row.to(tl.int64)[:, None, None] * groups + group, mask=meta_ok, other=0.0).to(tl.float32)
    if SYMMETRIC:
        less = _float(codes) - (8388608.0 + (1 << (BITS - 1)))
    else:
        bit = (first + row.to(tl.int64))[:, None, None] * BITS
        at, shift = zeros + bit // 32 * groups + group, (bit % 32).to(tl.int32)
        z = tl.load(at, mask=meta_ok, other=0)
        following = tl.load(at + groups, mask=meta_ok & (shift > 29), other=0) if BITS == 3 else z
        less = _float(codes) - _float(_field(z, following, shift, BITS))
    dense = tl.reshape(less * scale, (BN, 512)).to(out.dtype.element_ty)
    column = tl.program_id(1) * 512 + tl.arange(0, 512)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * K + column, dense, mask=rows_ok & (column < K))
