"""Device code of the kernel for few rows: y^T [N, M] = W [N, K] @ x^T [K, M], with 4- or 8-bit weights as the left operand.

    program (block of BN output rows, block of BM rows of x, part of K)

The left operand of Hopper's tensor cores may be in registers. Words go from memory through a ring of STAGES buffers to
registers, become integers there (`llmq.kernels._unpack`) and are multiplied there; dense weights exist nowhere else. The
tensor core multiplies integers; each group's sum is scaled once in float32. That costs one multiplication per output and group
instead of one per weight, and rounds nothing. Per channel (GROUP 0) it happens once at the end.

From BM 128 on (from 64 on for groups of 32 and 64) the scale is multiplied into the weight instead, which is rounded once to
x's dtype: these are the weights that the slab kernel multiplies. It costs half an instruction per weight, at any BM, and needs
one set of sums instead of two, for which there are no registers. So this kernel also serves a medium number of rows. For sm_90,
float16, groups of 128: a block of 128 rows takes 3.8 instructions per weight, two blocks of 64 take 5.4, and the tensor cores
take the time of 11 for 128 rows. A kernel with x as the left operand would first store dense weights to shared memory.

8-bit words come in two blocks per tile, each unpacked like one of 4 bits. sm_90, groups of 128, blocks of 128 x 16: 2.5
(float16) and 3.0 (bfloat16) instructions per weight, of 8 that there is time for, since there are twice the bytes.

From BM 32 on, rows of a block beyond M are read as row M - 1 and never written: a mask would cost two instructions per load.
Tried, left out: two tiles per iteration, 2.77 (BM 32) and 3.12 (BM 64) instructions instead of 3.03 and 3.47 with BN 64, but
with twice the shared memory, and a last odd tile waits for memory outside the ring.

Split K: every part of K writes its float32 sums to its own place in `partials`, then counts its arrival. The last part to
arrive adds all parts in order, so that the result does not depend on which part that is, writes y and sets the counter back to
zero for the next launch: no memory to clear, no second kernel, no atomics on floats, the same bits every time.

The host (`llmq.kernels.wna16`) guarantees: words, scales and zeros as `llmq.kernels.layout` makes them, BN a divisor of
their rows; x, y and all others 16-byte aligned; x's row stride and K divisible by 16 and below 2**24; counters zero;
M, N, K >= 1.
"""

import triton
import triton.language as tl

from llmq.kernels._unpack import beside, beside4, pairs


@triton.jit
def _spread(low, high):
    """Values of rows r and r + 8 of every 16, each [N / 16, 8] -> [N]. A tensor-core thread holds both: nothing moves."""
    both = tl.permute(tl.join(low, high), (0, 2, 1))  # [N / 16, 2, 8]
    return tl.reshape(both, (16 * both.shape[0],))


@triton.jit
def _meta(scales, zeros, SYMMETRIC: tl.constexpr, SCALE: tl.constexpr):
    """One group's scales, float32 [N], and zero points, int32 [N, 1] with one in both halves of a word (0 if symmetric)."""
    words = tl.load(scales)
    low = (words & 0xFFFF).to(tl.int16).to(SCALE, bitcast=True)
    high = ((words >> 16) & 0xFFFF).to(tl.int16).to(SCALE, bitcast=True)
    scale = _spread(low, high).to(tl.float32)
    if SYMMETRIC:
        return scale, 0
    else:
        both = tl.load(zeros)
        zero = _spread(both & 0xFFFF, (both >> 16) & 0xFFFF)
        return scale, (zero | (zero << 16))[:, None]


@triton.jit
def _times(w, s, DTYPE: tl.constexpr, SCALE: tl.constexpr, FORM: tl.constexpr):
    """Integers w [N, k] times scales s [N], rounded once: the weights that `llmq.kernels.slab` dequantizes."""
    if FORM == "upcast" or SCALE != DTYPE:
        product = w.to(tl.float32) * s[:, None]
        return product if FORM == "upcast" else product.to(DTYPE)
    else:
        return w * s.to(DTYPE)[:, None]


@triton.jit
def _inputs(pointers, rows_ok, left, RAGGED: tl.constexpr, FORM: tl.constexpr, CLAMP: tl.constexpr):
    """A run of x^T [k, BM]. left: bool [k, 1], the columns that exist, if RAGGED. CLAMP: all rows exist."""
    if CLAMP:
        if RAGGED:
            x = tl.load(pointers, mask=left, other=0.0)
        else:
            x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=rows_ok & left if RAGGED else rows_ok, other=0.0)
    return x.to(tl.float32) if FORM == "upcast" else x


@triton.jit
def _write(acc, bias, y, n, m, N, M, BIAS: tl.constexpr):
    """acc [BN, BM] -> y [M, N]."""
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = y + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _metas(scales, zeros, tile, padded, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE: tl.constexpr):
    """The scales and zero points of a tile's four runs of 32 columns. padded: words of a group."""
    group = (tile // (GROUP // 128) if GROUP >= 128 else tile * (128 // GROUP)) * padded
    s0, z0 = _meta(scales + group, zeros + group, SYMMETRIC, SCALE)
    s1, z1, s2, z2, s3, z3 = s0, z0, s0, z0, s0, z0
    if GROUP == 64:
        s2, z2 = _meta(scales + group + padded, zeros + group + padded, SYMMETRIC, SCALE)
        s3, z3 = s2, z2
    if GROUP == 32:
        group += padded
        s1, z1 = _meta(scales + group, zeros + group, SYMMETRIC, SCALE)
        group += padded
        s2, z2 = _meta(scales + group, zeros + group, SYMMETRIC, SCALE)
        group += padded
        s3, z3 = _meta(scales + group, zeros + group, SYMMETRIC, SCALE)
    return s0, z0, s1, z1, s2, z2, s3, z3


@triton.jit
def _turn(
    acc, q, more, x, rows_ok, k, left, scales, zeros, tile, padded,
    BITS: tl.constexpr, GROUP: tl.constexpr, FOLD: tl.constexpr, SYMMETRIC: tl.constexpr, RAGGED: tl.constexpr,
    SCALE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """acc plus the product of a tile's words (q and more, [BN, 16]) and x [columns, BM]. left: columns from here to the end."""
    s0, z0, s1, z1, s2, z2, s3, z3 = _metas(scales, zeros, tile, padded, GROUP, SYMMETRIC, SCALE)
    x0 = _inputs(x, rows_ok, k < left, RAGGED, FORM, CLAMP)
    if FOLD or GROUP >= 128:
        a, b, c, d = pairs(q, more, z0, z1, z2, z3, BITS, DTYPE, SYMMETRIC, FORM)
        if FOLD:
            a, b = _times(a, s0, DTYPE, SCALE, FORM), _times(b, s1, DTYPE, SCALE, FORM)
            c, d = _times(c, s2, DTYPE, SCALE, FORM), _times(d, s3, DTYPE, SCALE, FORM)
            acc = tl.dot(beside4(a, b, c, d), x0, acc)
        else:
            acc += tl.dot(beside4(a, b, c, d), x0) * s0[:, None]
    elif GROUP == 64:
        x1 = _inputs(x + 64, rows_ok, k < left - 64, RAGGED, FORM, CLAMP)
        a, b, c, d = pairs(q, more, z0, z1, z2, z3, BITS, DTYPE, SYMMETRIC, FORM)
        acc += tl.dot(beside(a, b), x0) * s0[:, None]
        acc += tl.dot(beside(c, d), x1) * s2[:, None]
    else:
        x1 = _inputs(x + 32, rows_ok, k < left - 32, RAGGED, FORM, CLAMP)
        x2 = _inputs(x + 64, rows_ok, k < left - 64, RAGGED, FORM, CLAMP)
        x3 = _inputs(x + 96, rows_ok, k < left - 96, RAGGED, FORM, CLAMP)
        a, b, c, d = pairs(q, more, z0, z1, z2, z3, BITS, DTYPE, SYMMETRIC, FORM)
        acc += tl.dot(a, x0) * s0[:, None]
        acc += tl.dot(b, x1) * s1[:, None]
        acc += tl.dot(c, x2) * s2[:, None]
        acc += tl.dot(d, x3) * s3[:, None]
    return acc


@triton.jit
def _together(acc, bias, y, partials, counters, n, m, N, M, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
              BIAS: tl.constexpr):  # fmt: skip
    """Write the sums of this part. The last part to arrive adds all parts in order and writes y."""
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at = partials + block.to(tl.int64) * (SPLIT * BN * BM) + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    tl.store(at + tl.program_id(2) * (BN * BM), acc)
    tl.debug_barrier()  # all threads have written their sums before one thread counts the arrival
    arrived = tl.atomic_add(counters + block, 1, sem="acq_rel")
    if arrived == SPLIT - 1:
        total = tl.zeros((BN, BM), tl.float32)
        for other in range(SPLIT):
            total += tl.load(at + other * (BN * BM), cache_modifier=".cg")
        _write(total, bias, y, n, m, N, M, BIAS)
        tl.store(counters + block, 0)


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def wna16_swap(
    x, words, scales, zeros, bias, y, partials, counters,
    M, N, K, stride, tiles,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr, SCALE: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """x [M, K] with row stride `stride`, words [N / 64, tiles, 16 BITS, 16], scales and zeros [groups, N / 2] -> y [M, N].

    (Over 50 lines: half of them are the arguments.)
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    FOLD: tl.constexpr = GROUP > 0 and (BM >= 128 or (BM >= 64 and GROUP < 128))
    RUN: tl.constexpr = GROUP if (GROUP == 32 or GROUP == 64) and not FOLD else 128  # columns of one product
    block_n, block_m = tl.program_id(0), tl.program_id(1)
    per = tl.cdiv(tiles, SPLIT)
    first = tl.program_id(2) * per
    last = tl.minimum(first + per, tiles)
    rows, n, m = tl.arange(0, BN), block_n * BN + tl.arange(0, BN), block_m * BM + tl.arange(0, BM)
    word, k = tl.arange(0, 16)[None, :], tl.arange(0, RUN)[:, None]
    TILE: tl.constexpr = 256 * BITS  # words
    words += ((block_n * (BN // 64)).to(tl.int64) * tiles + first) * TILE
    if BN == 64:
        words_at = words + rows[:, None] * 16 + word
    else:  # row tiles are `tiles` tiles apart
        words_at = words + (rows // 64 * TILE)[:, None] * tiles + (rows % 64 * 16)[:, None] + word
    down = tl.minimum(tl.arange(0, BM), M - 1 - block_m * BM) if BM >= 32 else tl.arange(0, BM)
    x += (block_m * BM).to(tl.int64) * stride + first * 128
    x_in, rows_ok = down[None, :] * stride + k, (m < M)[None, :]
    padded = tl.cdiv(N, 64) * 32
    pair = block_n * (BN // 2) + tl.arange(0, BN // 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    scales_at, zeros_at = scales + pair, zeros + pair

    acc = tl.zeros((BN, BM), tl.float32)
    if GROUP == 0:
        scale, zero = _meta(scales_at, zeros_at, SYMMETRIC, SCALE)
    for tile in tl.range(first, last, num_stages=STAGES):
        q, left = tl.load(words_at), K - tile * 128
        more = tl.load(words_at + 1024) if BITS == 8 else q
        if GROUP == 0:
            xs = _inputs(x + x_in, rows_ok, k < left, RAGGED, FORM, BM >= 32)
            a, b, c, d = pairs(q, more, zero, zero, zero, zero, BITS, DTYPE, SYMMETRIC, FORM)
            acc = tl.dot(beside4(a, b, c, d), xs, acc)
        else:
            acc = _turn(acc, q, more, x + x_in, rows_ok, k, left, scales_at, zeros_at, tile, padded, BITS,
                        GROUP, FOLD, SYMMETRIC, RAGGED, SCALE, DTYPE, FORM, BM >= 32)  # fmt: skip
        words_at += TILE
        x += 128
    if GROUP == 0:
        acc *= scale[:, None]
    if SPLIT == 1:
        _write(acc, bias, y, n, m, N, M, BIAS)
    else:
        _together(acc, bias, y, partials, counters, n, m, N, M, BM, BN, SPLIT, BIAS)
