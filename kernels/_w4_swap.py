"""Device code of the kernel for few rows: y^T [N, M] = W [N, K] @ x^T [K, M], weights of 4 bits as the left operand.

    program (block of BN output rows, block of BM rows of x, part of K)

The left operand of Hopper's tensor cores may lie in registers: words go from memory through a ring of STAGES buffers to
registers, become integers there (`llmq.kernels._unpack`) and are multiplied there; dense weights never exist anywhere else.
The tensor core multiplies integers; each group's sum is scaled once in float32, which costs a multiplication for each
output and group in place of one for each weight, and rounds nothing. Per channel (GROUP 0) that is once at the end.

Split K: every part of K writes its float32 sums to its own place in `partials`, and counts itself in. Who comes last
adds all parts in their order, so that the result does not depend on who that is, writes y and sets the counter back to zero
for the next launch: no memory to clear, no second kernel, no atomics on floats, the same bits every time.

What the host promises (`llmq.kernels.w4`): words, scales and zeros as `llmq.kernels.layout` makes them, BN a divisor
of their rows; x, y and all others 16-byte aligned, x's row stride and K divisible by 16; counters zero; M, N, K >= 1.
"""

import triton
import triton.language as tl

from llmq.kernels._unpack import beside, beside4, pairs


@triton.jit
def _spread(low, high):
    """Values of rows r and r + 8 of every 16, each [N / 16, 8] -> [N]. A tensor core's thread has both: nothing moves."""
    both = tl.permute(tl.join(low, high), (0, 2, 1))  # [N / 16, 2, 8]
    return tl.reshape(both, (16 * both.shape[0],))


@triton.jit
def _meta(scales, zeros, SYMMETRIC: tl.constexpr, SCALE: tl.constexpr):
    """One group's scales, float32 [N], and zero points, int32 [N, 1] with one in both halves (0 when symmetric)."""
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
def _inputs(pointers, rows_ok, left, RAGGED: tl.constexpr, FORM: tl.constexpr):
    """A run of x^T [k, BM]. left: bool [k, 1], which columns exist, where RAGGED."""
    x = tl.load(pointers, mask=rows_ok & left if RAGGED else rows_ok, other=0.0)
    return x.to(tl.float32) if FORM == "upcast" else x


@triton.jit
def _write(acc, bias, y, n, m, N, M, BIAS: tl.constexpr):
    """acc [BN, BM] -> y [M, N]."""
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = y + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def w4_swap(
    x, words, scales, zeros, bias, y, partials, counters,
    M, N, K, stride, tiles,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr, SCALE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """x [M, K] with rows `stride` apart, words [N / 64, tiles, 64, 16], scales and zeros [groups, N / 2] -> y [M, N]."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    RUN: tl.constexpr = GROUP if GROUP == 32 or GROUP == 64 else 128  # columns that one product takes
    block_n, block_m, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    per = tl.cdiv(tiles, SPLIT)
    first = part * per
    last = tl.minimum(first + per, tiles)

    rows, n, m = tl.arange(0, BN), block_n * BN + tl.arange(0, BN), block_m * BM + tl.arange(0, BM)
    word, k = tl.arange(0, 16)[None, :], tl.arange(0, RUN)[:, None]
    words += ((block_n * (BN // 64)).to(tl.int64) * tiles + first) * 1024
    if BN == 64:
        words_at = words + rows[:, None] * 16 + word
    else:  # row tiles lie `tiles` tiles apart
        words_at = words + (rows // 64 * 1024)[:, None] * tiles + (rows % 64 * 16)[:, None] + word
    x_at = x + (block_m * BM).to(tl.int64) * stride + first * 128 + tl.arange(0, BM)[None, :] * stride + k
    rows_ok = (m < M)[None, :]
    padded = tl.cdiv(N, 64) * 32  # a group's words
    pair = block_n * (BN // 2) + tl.arange(0, BN // 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    scales_at, zeros_at = scales + pair, zeros + pair

    acc = tl.zeros((BN, BM), tl.float32)
    if GROUP == 0:
        scale, zero = _meta(scales_at, zeros_at, SYMMETRIC, SCALE)
    for tile in tl.range(first, last, num_stages=STAGES):
        q = tl.load(words_at)
        left = k < K - tile * 128
        if GROUP == 0:
            xs = _inputs(x_at, rows_ok, left, RAGGED, FORM)
            a, b, c, d = pairs(q, zero, zero, zero, zero, DTYPE, SYMMETRIC, FORM)
            acc = tl.dot(beside4(a, b, c, d), xs, acc)
        elif GROUP >= 128:
            group = tile // (GROUP // 128) * padded
            s, z = _meta(scales_at + group, zeros_at + group, SYMMETRIC, SCALE)
            xs = _inputs(x_at, rows_ok, left, RAGGED, FORM)
            a, b, c, d = pairs(q, z, z, z, z, DTYPE, SYMMETRIC, FORM)
            acc += tl.dot(beside4(a, b, c, d), xs) * s[:, None]
        elif GROUP == 64:
            group = 2 * tile * padded
            s0, z0 = _meta(scales_at + group, zeros_at + group, SYMMETRIC, SCALE)
            s1, z1 = _meta(scales_at + group + padded, zeros_at + group + padded, SYMMETRIC, SCALE)
            x0 = _inputs(x_at, rows_ok, left, RAGGED, FORM)
            x1 = _inputs(x_at + 64, rows_ok, k < K - tile * 128 - 64, RAGGED, FORM)
            a, b, c, d = pairs(q, z0, z0, z1, z1, DTYPE, SYMMETRIC, FORM)
            acc += tl.dot(beside(a, b), x0) * s0[:, None]
            acc += tl.dot(beside(c, d), x1) * s1[:, None]
        else:
            group = 4 * tile * padded
            s0, z0 = _meta(scales_at + group, zeros_at + group, SYMMETRIC, SCALE)
            group += padded
            s1, z1 = _meta(scales_at + group, zeros_at + group, SYMMETRIC, SCALE)
            group += padded
            s2, z2 = _meta(scales_at + group, zeros_at + group, SYMMETRIC, SCALE)
            group += padded
            s3, z3 = _meta(scales_at + group, zeros_at + group, SYMMETRIC, SCALE)
            x0 = _inputs(x_at, rows_ok, left, RAGGED, FORM)
            x1 = _inputs(x_at + 32, rows_ok, k < K - tile * 128 - 32, RAGGED, FORM)
            x2 = _inputs(x_at + 64, rows_ok, k < K - tile * 128 - 64, RAGGED, FORM)
            x3 = _inputs(x_at + 96, rows_ok, k < K - tile * 128 - 96, RAGGED, FORM)
            a, b, c, d = pairs(q, z0, z1, z2, z3, DTYPE, SYMMETRIC, FORM)
            acc += tl.dot(a, x0) * s0[:, None]
            acc += tl.dot(b, x1) * s1[:, None]
            acc += tl.dot(c, x2) * s2[:, None]
            acc += tl.dot(d, x3) * s3[:, None]
        words_at += 1024
        x_at += 128
    if GROUP == 0:
        acc *= scale[:, None]

    if SPLIT == 1:
        _write(acc, bias, y, n, m, N, M, BIAS)
    else:
        block = block_m * tl.num_programs(0) + block_n
        at = partials + block.to(tl.int64) * (SPLIT * BN * BM) + rows[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(at + part * (BN * BM), acc)
        tl.debug_barrier()  # the sums of all threads are written before the one that counts says so
        arrived = tl.atomic_add(counters + block, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for other in range(SPLIT):
                total += tl.load(at + other * (BN * BM), cache_modifier=".cg")
            _write(total, bias, y, n, m, N, M, BIAS)
            tl.store(counters + block, 0)
