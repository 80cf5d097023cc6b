"""Device code: int32 words of the runtime layout (`llmq.kernels.layout`) -> code - zero point, in registers.

A word holds pairs of codes, four of 4 bits or two of 8; pair p starts at bits p b and 16 + p b, with b the bits of a code. The
codes of a pair are neighbours along K, as in a tensor core's register, which holds two 16-bit operands: a pair is converted in
place, both codes at once, and never moves.

Integers become floats without a conversion instruction: 0x6400 | n is the float16 1024 + n, 0x4300 | n is the bfloat16
128 + n. Both are exact for 4-bit codes, and so is the difference to 1024 + zero or 128 + zero. There are three forms:

    assembly    NVIDIA. float16 uses the high pairs without a shift: 0x6400 | 16 n = 1024 + 16 n, times 1/16, minus 64 + zero.
                bfloat16 has 7 bits of mantissa, too few for that, and sm_80 has no bfloat16 subtraction: a shift and an fma
    portable    plain integer Triton: AMD and the interpreter, which runs no assembly
    upcast      float32, for bfloat16 in the interpreter, which computes with the bit patterns of bfloat16

For 8 bits, float16 holds 1024 + n as before. bfloat16 has room for the lower 7 bits: 128 + those, minus 128 if the eighth bit
is set and minus 256 if it is not (one bit of the subtrahend is flipped), which gives n - 128; then plus 128 - zero, made from
the zero point in the same way. All steps are exact: a bfloat16 represents every integer up to 256.

All forms give the same integers, so the form never changes a result.
"""

import triton
import triton.language as tl

_F16 = tl.constexpr(
    """{
    .reg .b32 s, v<4>, half, low, high;
    mov.b32 half, 0x2C002C00; mov.b32 low, 0x64086408; mov.b32 high, 0xD480D480;
    shr.u32 s, $8, 8;
    lop3.b32 v0, $8, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 v1, $8, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 v2, s, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 v3, s, 0x00F000F0, 0x64006400, 0xEA;
    sub.f16x2 v0, v0, low; sub.f16x2 v2, v2, low;
    fma.rn.f16x2 v1, v1, half, high; fma.rn.f16x2 v3, v3, half, high;
    mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1; mov.b32 {$4,$5}, v2; mov.b32 {$6,$7}, v3;
    }"""
)
# $9 .. $12: the zero points of pairs 0 .. 3, each in both halves of a word.
_F16_ZERO = tl.constexpr(
    """{
    .reg .b32 s, v<4>, z<4>, half;
    mov.b32 half, 0x2C002C00;
    or.b32 z0, $9, 0x64006400; or.b32 z2, $11, 0x64006400;
    shl.b32 z1, $10, 4; or.b32 z1, z1, 0xD400D400;
    shl.b32 z3, $12, 4; or.b32 z3, z3, 0xD400D400;
    shr.u32 s, $8, 8;
    lop3.b32 v0, $8, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 v1, $8, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 v2, s, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 v3, s, 0x00F000F0, 0x64006400, 0xEA;
    sub.f16x2 v0, v0, z0; sub.f16x2 v2, v2, z2;
    fma.rn.f16x2 v1, v1, half, z1; fma.rn.f16x2 v3, v3, half, z3;
    mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1; mov.b32 {$4,$5}, v2; mov.b32 {$6,$7}, v3;
    }"""
)
_BF16 = tl.constexpr(
    """{
    .reg .b32 s<3>, v<4>, one, low;
    mov.b32 one, 0x3F803F80; mov.b32 low, 0xC308C308;
    shr.u32 s0, $8, 4; shr.u32 s1, $8, 8; shr.u32 s2, $8, 12;
    lop3.b32 v0, $8, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 v1, s0, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 v2, s1, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 v3, s2, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 v0, v0, one, low; fma.rn.bf16x2 v1, v1, one, low;
    fma.rn.bf16x2 v2, v2, one, low; fma.rn.bf16x2 v3, v3, one, low;
    mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1; mov.b32 {$4,$5}, v2; mov.b32 {$6,$7}, v3;
    }"""
)
_BF16_ZERO = tl.constexpr(
    """{
    .reg .b32 s<3>, v<4>, z<4>, one;
    mov.b32 one, 0x3F803F80;
    or.b32 z0, $9, 0xC300C300; or.b32 z1, $10, 0xC300C300;
    or.b32 z2, $11, 0xC300C300; or.b32 z3, $12, 0xC300C300;
    shr.u32 s0, $8, 4; shr.u32 s1, $8, 8; shr.u32 s2, $8, 12;
    lop3.b32 v0, $8, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 v1, s0, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 v2, s1, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 v3, s2, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 v0, v0, one, z0; fma.rn.bf16x2 v1, v1, one, z1;
    fma.rn.bf16x2 v2, v2, one, z2; fma.rn.bf16x2 v3, v3, one, z3;
    mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1; mov.b32 {$4,$5}, v2; mov.b32 {$6,$7}, v3;
    }"""
)


_F16_BYTES = tl.constexpr(
    """{
    .reg .b32 s, v<2>, low;
    mov.b32 low, 0x64806480;
    shr.u32 s, $4, 8;
    lop3.b32 v0, $4, 0x00FF00FF, 0x64006400, 0xEA;
    lop3.b32 v1, s, 0x00FF00FF, 0x64006400, 0xEA;
    sub.f16x2 v0, v0, low; sub.f16x2 v1, v1, low;
    mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1;
    }"""
)
# $5, $6: the zero points of pairs 0 and 1, each in both halves of a word.
_F16_BYTES_ZERO = tl.constexpr(
    """{
    .reg .b32 s, v<2>, z<2>;
    or.b32 z0, $5, 0x64006400; or.b32 z1, $6, 0x64006400;
    shr.u32 s, $4, 8;
    lop3.b32 v0, $4, 0x00FF00FF, 0x64006400, 0xEA;
    lop3.b32 v1, s, 0x00FF00FF, 0x64006400, 0xEA;
    sub.f16x2 v0, v0, z0; sub.f16x2 v1, v1, z1;
    mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1;
    }"""
)
_BF16_BYTES = tl.constexpr(
    """{
    .reg .b32 s, v<2>, less<2>, one;
    mov.b32 one, 0x3F803F80;
    shr.u32 s, $4, 8;
    lop3.b32 v0, $4, 0x007F007F, 0x43004300, 0xEA; lop3.b32 less0, $4, 0x00800080, 0xC380C380, 0x6A;
    lop3.b32 v1, s, 0x007F007F, 0x43004300, 0xEA; lop3.b32 less1, s, 0x00800080, 0xC380C380, 0x6A;
    fma.rn.bf16x2 v0, v0, one, less0; fma.rn.bf16x2 v1, v1, one, less1;
    mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1;
    }"""
)
_BF16_BYTES_ZERO = tl.constexpr(
    """{
    .reg .b32 s, v<2>, z<2>, less<4>, one, minus;
    mov.b32 one, 0x3F803F80; mov.b32 minus, 0xBF80BF80;
    lop3.b32 z0, $5, 0x007F007F, 0x43004300, 0xEA; lop3.b32 less2, $5, 0x00800080, 0xC380C380, 0x6A;
    lop3.b32 z1, $6, 0x007F007F, 0x43004300, 0xEA; lop3.b32 less3, $6, 0x00800080, 0xC380C380, 0x6A;
    fma.rn.bf16x2 z0, z0, one, less2; fma.rn.bf16x2 z1, z1, one, less3;
    shr.u32 s, $4, 8;
    lop3.b32 v0, $4, 0x007F007F, 0x43004300, 0xEA; lop3.b32 less0, $4, 0x00800080, 0xC380C380, 0x6A;
    lop3.b32 v1, s, 0x007F007F, 0x43004300, 0xEA; lop3.b32 less1, s, 0x00800080, 0xC380C380, 0x6A;
    fma.rn.bf16x2 v0, v0, one, less0; fma.rn.bf16x2 v1, v1, one, less1;
    fma.rn.bf16x2 v0, z0, minus, v0; fma.rn.bf16x2 v1, z1, minus, v1;
    mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1;
    }"""
)


@triton.jit
def _bytes(q, z0, z1, DTYPE: tl.constexpr, SYMMETRIC: tl.constexpr):
    """`_assembled` for two pairs of 8 bits: four int16 tensors."""
    if SYMMETRIC:
        return tl.inline_asm_elementwise(
            asm=_F16_BYTES if DTYPE == tl.float16 else _BF16_BYTES,
            constraints="=h,=h,=h,=h,r",
            args=[q],
            dtype=(tl.int16,) * 4,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            asm=_F16_BYTES_ZERO if DTYPE == tl.float16 else _BF16_BYTES_ZERO,
            constraints="=h,=h,=h,=h,r,r,r",
            args=[q, z0, z1],
            dtype=(tl.int16,) * 4,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _assembled(q, z0, z1, z2, z3, DTYPE: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Eight int16 tensors shaped like q, the bits of floats: the low and the high code of pairs 0 .. 3, minus the zero point."""
    if SYMMETRIC:
        return tl.inline_asm_elementwise(
            asm=_F16 if DTYPE == tl.float16 else _BF16,
            constraints="=h,=h,=h,=h,=h,=h,=h,=h,r",
            args=[q],
            dtype=(tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            asm=_F16_ZERO if DTYPE == tl.float16 else _BF16_ZERO,
            constraints="=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r",
            args=[q, z0, z1, z2, z3],
            dtype=(tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _joined(low, high):
    """[N, W] and [N, W] -> [N, 2 W], alternating."""
    return tl.reshape(tl.join(low, high), (low.shape[0], 2 * low.shape[1]))


@triton.jit
def _portable(q, zero, p: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, SYMMETRIC: tl.constexpr):
    MOST: tl.constexpr = (1 << BITS) - 1
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    codes = (q >> (BITS * p)) & (MOST * 0x10001)
    if DTYPE == tl.float16:
        both = codes | 0x64006400
        low = (both & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high = ((both >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        if SYMMETRIC:
            return (_joined(low, high) - (1024.0 + MIDDLE)).to(DTYPE)
        else:
            return _joined(low, high) - ((zero & MOST) | 0x6400).to(tl.int16).to(DTYPE, bitcast=True)
    else:  # in float32, since AMD has no bfloat16 arithmetic; the upper half of the difference is the bfloat16
        if BITS == 4:
            both = codes | 0x43004300
            low = (both << 16).to(tl.float32, bitcast=True)
            high = ((both >> 16) << 16).to(tl.float32, bitcast=True)
        else:
            low = (((codes & MOST) << 15) | 0x43800000).to(tl.float32, bitcast=True)
            high = (((codes >> 1) & (MOST << 15)) | 0x43800000).to(tl.float32, bitcast=True)
        if SYMMETRIC:
            less = _joined(low, high) - (136.0 if BITS == 4 else 384.0)
        elif BITS == 4:
            less = _joined(low, high) - (((zero & 15) | 0x4300) << 16).to(tl.float32, bitcast=True)
        else:
            less = _joined(low, high) - (((zero & MOST) << 15) | 0x43800000).to(tl.float32, bitcast=True)
        return (less.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _upcast(q, zero, p: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    MOST: tl.constexpr = (1 << BITS) - 1
    both = (q >> (BITS * p)) & (MOST * 0x10001)
    codes = _joined(both & 0xFFFF, both >> 16)
    if SYMMETRIC:
        return (codes - (1 << (BITS - 1))).to(tl.float32)
    else:
        return (codes - (zero & MOST)).to(tl.float32)


@triton.jit
def _run(
    q, zero, p: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, SYMMETRIC: tl.constexpr, FORM: tl.constexpr
):
    if FORM == "portable":
        return _portable(q, zero, p, BITS, DTYPE, SYMMETRIC)
    else:
        return _upcast(q, zero, p, BITS, SYMMETRIC)


@triton.jit
def pairs(
    q, more, z0, z1, z2, z3, BITS: tl.constexpr, DTYPE: tl.constexpr, SYMMETRIC: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """Words q [N, 16] of one tile -> its four runs of 32 columns, each [N, 32], minus the zero point.

    more: the words of runs 2 and 3; q itself if BITS is 4. z0 .. z3: the runs' zero points, int32 [N, 1], each in both halves
    of a word; not read if SYMMETRIC. FORM: "assembly", "portable" or "upcast".
    """
    if FORM == "assembly":
        if BITS == 4:
            a, b, c, d, e, f, g, h = _assembled(q, z0, z1, z2, z3, DTYPE, SYMMETRIC)
        else:
            a, b, c, d = _bytes(q, z0, z1, DTYPE, SYMMETRIC)
            e, f, g, h = _bytes(more, z2, z3, DTYPE, SYMMETRIC)
        return (
            _joined(a, b).to(DTYPE, bitcast=True),
            _joined(c, d).to(DTYPE, bitcast=True),
            _joined(e, f).to(DTYPE, bitcast=True),
            _joined(g, h).to(DTYPE, bitcast=True),
        )
    else:
        LATER: tl.constexpr = 2 if BITS == 4 else 0  # the first pair of `more`, which are the same words for 4 bits
        return (
            _run(q, z0, 0, BITS, DTYPE, SYMMETRIC, FORM),
            _run(q, z1, 1, BITS, DTYPE, SYMMETRIC, FORM),
            _run(more, z2, LATER, BITS, DTYPE, SYMMETRIC, FORM),
            _run(more, z3, LATER + 1, BITS, DTYPE, SYMMETRIC, FORM),
        )


@triton.jit
def beside(left, right):
    """[N, W] and [N, W] -> [N, 2 W], concatenated within a thread's registers."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def beside4(a, b, c, d):
    """Four times [N, W] -> [N, 4 W], concatenated."""
    joined = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.permute(joined, (0, 3, 2, 1)), (a.shape[0], 4 * a.shape[1]))
