"""Device code of the kernel for packed experts: y[t] = W[expert(t)] @ x[row(t)], all experts in one launch.

    program (block of BN output rows, block of at most BM assignments of one expert)

The loop over K is that of `_wna16_swap` without split K; an expert's words, scales and zero points begin at its place in the
stacked layout. Columns of a block beyond its last assignment repeat the last one and are never written, at any BM: the rows
of x are gathered, so a mask would save nothing. No program reads what another one writes: the same bits every time.

PAIRS: block b is assignment b, and `order`, `first` and `last` are not read. Otherwise block b has the assignments
order[first[b]] .. order[last[b] - 1]. An expert of a block outside of 0 .. E - 1 ends the program at once.

The host (`llmq.kernels.grouped`) guarantees what `_wna16_swap` requires of x, words, scales and zeros, and rows of x that exist.
"""

import triton
import triton.language as tl

from llmq.kernels._unpack import beside4, pairs
from llmq.kernels._wna16_swap import _inputs, _meta, _turn


@triton.jit
def _assigned(order, first, last, rows, block, BM: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr):
    """A block's assignments, int32 [BM], which of them exist, and their rows of x, int64 [BM]."""
    at = tl.arange(0, BM)
    if PAIRS:
        assignment, exists = tl.zeros((BM,), tl.int32) + block, at == 0
    else:
        start, stop = tl.load(first + block), tl.load(last + block)
        exists = start + at < stop
        assignment = tl.load(order + tl.minimum(start + at, stop - 1))
    row = tl.load(rows + assignment) if ROWS else assignment
    return assignment, exists, row.to(tl.int64)


@triton.jit(do_not_specialize=["N", "tiles", "groups", "E"])
def wna16_grouped(
    x, words, scales, zeros, bias, y, experts, order, first, last, rows,
    N, K, stride, tiles, groups, E,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr, SCALE: tl.constexpr, FORM: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x [M, K], words [E, N / 64, tiles, 16 BITS, 16], scales and zeros [E, groups, N / 2], bias [E, N] -> y [T, N].

    experts: of each block. (Over 50 lines: half of them are the arguments.)
    """
    block_n, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts + block)
    if (expert >= 0) & (expert < E):
        DTYPE: tl.constexpr = x.dtype.element_ty
        FOLD: tl.constexpr = GROUP > 0 and BM >= 64 and GROUP < 128
        RUN: tl.constexpr = GROUP if (GROUP == 32 or GROUP == 64) and not FOLD else 128  # columns of one product
        TILE: tl.constexpr = 256 * BITS  # words
        assignment, exists, row = _assigned(order, first, last, rows, block, BM, PAIRS, ROWS)
        down, n = tl.arange(0, BN), block_n * BN + tl.arange(0, BN)
        word, k = tl.arange(0, 16)[None, :], tl.arange(0, RUN)[:, None]
        row_tiles = tl.cdiv(N, 64)
        words += (expert.to(tl.int64) * row_tiles + block_n * (BN // 64)) * tiles * TILE
        words_at = words + (down // 64 * TILE)[:, None] * tiles + (down % 64 * 16)[:, None] + word
        x_at = x + row[None, :] * stride + k
        padded = row_tiles * 32
        pair = block_n * (BN // 2) + tl.arange(0, BN // 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
        own = expert.to(tl.int64) * groups * padded
        scales_at, zeros_at = scales + own + pair, zeros + own + pair

        acc = tl.zeros((BN, BM), tl.float32)
        if GROUP == 0:
            scale, zero = _meta(scales_at, zeros_at, SYMMETRIC, SCALE)
        for tile in tl.range(0, tiles, num_stages=STAGES):
            q, left = tl.load(words_at), K - tile * 128
            more = tl.load(words_at + 1024) if BITS == 8 else q
            if GROUP == 0:
                xs = _inputs(x_at, exists, k < left, RAGGED, FORM, True)
                a, b, c, d = pairs(q, more, zero, zero, zero, zero, BITS, DTYPE, SYMMETRIC, FORM)
                acc = tl.dot(beside4(a, b, c, d), xs, acc)
            else:
                acc = _turn(acc, q, more, x_at, exists, k, left, scales_at, zeros_at, tile, padded, BITS,
                            GROUP, FOLD, SYMMETRIC, RAGGED, SCALE, DTYPE, FORM, True)  # fmt: skip
            words_at += TILE
            x_at += 128
        if GROUP == 0:
            acc *= scale[:, None]
        if BIAS:
            acc += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        at = y + assignment.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(at, acc.to(y.dtype.element_ty), mask=exists[None, :] & (n < N)[:, None])
