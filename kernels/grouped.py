"""Packed experts in one launch: y[t] = x[rows[t]] @ W[experts[t]]^T + bias[experts[t]]. Device code: `_grouped`.

An assignment t is a token and one of its experts. The weights of all experts are stacked in the layout of the few-rows kernel
(`llmq.kernels.layout`). Few assignments, at most `MAX_PAIRS` and no more than there are experts, take one block each.
Otherwise assignments are sorted by expert on the device and cut into blocks of BM; the number of blocks is an upper bound that
depends on shapes alone, so the host never waits for the device, and a block too many ends at once. An expert without
assignments costs at most that.

Where blocks have the same arithmetic (BM below 64, or groups of 128 and more), both paths give the same bits as the few-rows
kernel without split K. Requires what `llmq.kernels.wna16` requires. Left out: split K, since experts fill a GPU; a gradient;
a choice of this kernel by measurement: none of it was timed yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.kernels import layout, wna16
from llmq.kernels.launch import Device, Launch, bucket, compiler_options, form_of, stages_of, warps_of
from llmq.kernels.layout import Tiled
from llmq.kernels.problem import Packed

MAX_PAIRS = 32
MAX_BLOCK = 64
MAX_BLOCKS = 65535  # of a grid's second dimension


@dataclass(frozen=True)
class GroupedWeight:
    """Weights [E, N, K] in the runtime layout."""

    words: Tensor
    """int32 [E, NT, KT, 16 * bits, 16]: words[e] are the words of `Tiled` for expert e; so are scales and zeros."""
    scales: Tensor
    """[E, groups, NT * 64], float16 or bfloat16."""
    zeros: Tensor | None
    """int16 [E, groups, NT * 64]; None if symmetric."""
    out_features: int
    """N."""
    in_features: int
    """K."""
    bits: int
    """4 or 8."""
    group_size: int
    """Columns that share one scale; K for one scale per channel."""


@dataclass(frozen=True)
class Blocks:
    """Which block of the launch computes which assignments. int32, on the device."""

    experts: Tensor
    """[B]: of each block; outside of 0 .. E - 1 for a block without work."""
    order: Tensor
    """[T]: assignments sorted by expert; not read for pairs, like the next two."""
    first: Tensor
    """[B]: the first place of a block in `order`."""
    last: Tensor
    """[B]: the place after a block's last one."""
    pairs: bool
    """Whether block t is assignment t."""


def prepare(packed: Sequence[Packed]) -> GroupedWeight:
    """Stack the experts' weights, expert 0 first. Raises `LlmqError` if they differ in more than values."""
    if not packed:
        raise LlmqError("a grouped weight requires at least 1 expert; got 0")
    properties = {(p.out_features, p.in_features, p.bits, p.group_size, p.scale.dtype, p.zero is None) for p in packed}
    if len(properties) > 1:
        raise LlmqError(
            "experts must have the same shape, bits, group_size, scale dtype and symmetry; "
            f"got {len(properties)} different ones; run them one by one"
        )
    first, *others = [wna16.prepare(p) for p in packed]
    every = (first, *others)
    zeros = [tiled.zeros for tiled in every if tiled.zeros is not None]
    return GroupedWeight(
        torch.stack([tiled.words for tiled in every]),
        torch.stack([tiled.scales for tiled in every]),
        torch.stack(zeros) if zeros else None,
        first.out_features,
        first.in_features,
        first.bits,
        first.group_size,
    )


def multiply(
    x: Tensor, experts: Tensor, rows: Tensor | None, weight: GroupedWeight, bias: Tensor | None = None
) -> Tensor:
    """x [M, K], experts [T], rows [T] or None (row t) -> y [T, N] in x's dtype, float16 or bfloat16.

    experts, rows: int32 or int64. An assignment to an expert outside of 0 .. E - 1 gives zeros. rows must be in 0 .. M - 1,
    which is not checked. bias: [E, N] in x's dtype. Not differentiable. Raises `LlmqError` for wrong shapes or dtypes.
    """
    sizes = (weight.out_features, weight.in_features, weight.bits, weight.group_size)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        y: Tensor = torch.ops.llmq.wna16_grouped(
            x, experts, rows, weight.words, weight.scales, weight.zeros, bias, *sizes
        )
        return y
    return launched(x, experts, rows, weight, bias)


def launched(
    x: Tensor,
    experts: Tensor,
    rows: Tensor | None,
    weight: GroupedWeight,
    bias: Tensor | None = None,
    launch: Launch | None = None,
    pairs: bool | None = None,
) -> Tensor:
    """`multiply` without torch.compile. launch, pairs: the configuration, and whether each assignment is a block."""
    _check(x, experts, rows, weight, bias)
    y = x.new_zeros(experts.shape[0], weight.out_features)
    if experts.shape[0] == 0 or weight.out_features == 0 or x.shape[0] == 0:
        return y
    count = weight.words.shape[0]
    if pairs is None:
        pairs = experts.shape[0] <= min(MAX_PAIRS, count)
    dtype = wna16.DTYPES[x.dtype]
    launch = launch or configure(wna16.device_of(x.device), dtype, experts.shape[0], weight, pairs)
    blocks = blocks_of(experts, count, launch.bm, pairs)
    if blocks.experts.shape[0] > MAX_BLOCKS:
        most = (MAX_BLOCKS - count) * launch.bm
        raise LlmqError(f"one launch takes {most} assignments; got {experts.shape[0]}; split them into several calls")
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            _launch(wna16._aligned(x), rows, weight, bias, y, blocks, launch)
    else:
        _launch(wna16._aligned(x), rows, weight, bias, y, blocks, launch)
    return y


def configure(device: Device, dtype: str, assignments: int, weight: GroupedWeight, pairs: bool) -> Launch:
    """The configuration by the rules of `llmq.kernels.launch`, for the mean number of assignments of an expert."""
    count, row_tiles = weight.words.shape[:2]
    bm = min(MAX_BLOCK, bucket(device.arch, 1 if pairs else -(-assignments // count)))
    blocks = row_tiles // 2 * (assignments if pairs else min(assignments, count))
    wide = row_tiles % 2 == 0 and (bm >= 32 or device.arch == "sm_100" or blocks >= device.processors)
    bn = 128 if wide else 64
    warps = warps_of(device.arch, bm, bn)
    return Launch(bm, bn, warps, stages_of(device.arch, weight.bits), 1, form_of(device.arch, dtype))


def blocks_of(experts: Tensor, count: int, bm: int, pairs: bool) -> Blocks:
    """experts [T] -> the blocks of the launch for `count` experts, without waiting for the device."""
    if pairs:
        own = experts.to(torch.int32)
        return Blocks(own, own, own, own, True)
    total = experts.shape[0]
    ordered, order = torch.sort(experts, stable=True)
    ids = torch.arange(count, device=experts.device, dtype=experts.dtype)
    starts, ends = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)  # [E]
    needed = (ends - starts + bm - 1) // bm
    after = needed.cumsum(0)  # blocks up to and with each expert
    block = torch.arange(total // bm + min(count, total), device=experts.device)  # [B], at least after[-1]
    expert = torch.searchsorted(after, block, right=True)  # `count` for a block without work
    real = expert.clamp(max=count - 1)
    first = starts[real] + (block - (after - needed)[real]) * bm
    last = torch.minimum(first + bm, ends[real])
    return Blocks(expert.int(), order.int(), first.int(), last.int(), False)


def _check(x: Tensor, experts: Tensor, rows: Tensor | None, weight: GroupedWeight, bias: Tensor | None) -> None:
    """Raise `LlmqError` for anything but wrong values of rows that would access memory out of bounds."""
    count = weight.words.shape[0] if weight.words.ndim == 5 else 0
    zeros = weight.zeros
    same = weight.scales.ndim == 3 and weight.scales.shape[0] == count and weight.scales.is_contiguous()
    if zeros is not None:
        same = same and zeros.shape == weight.scales.shape and zeros.is_contiguous()
    if count == 0 or not same or not weight.words.is_contiguous():
        raise LlmqError(
            f"words, scales and zeros must be contiguous, one for each of at least 1 expert; got words "
            f"{list(weight.words.shape)}, scales {list(weight.scales.shape)}; use prepare"
        )
    sizes = (weight.out_features, weight.in_features, weight.bits, weight.group_size)
    one = Tiled(weight.words[0], weight.scales[0], None if zeros is None else zeros[0], *sizes)
    wna16.check_arguments(x, one, None)
    assigned = [("experts", experts)] + ([] if rows is None else [("rows", rows)])
    for name, tensor in assigned:
        if tensor.ndim != 1 or tensor.dtype not in (torch.int32, torch.int64) or tensor.shape != experts.shape:
            raise LlmqError(f"{name} must be int32 or int64 [T], like experts; got {tensor.dtype} {list(tensor.shape)}")
    if rows is None and experts.shape[0] != x.shape[0]:
        raise LlmqError(f"without rows, x must have a row for each of {experts.shape[0]} assignments; got {x.shape[0]}")
    if bias is not None:
        wna16._check_stored("bias", bias, x.dtype, (count, weight.out_features))
    for name, value in (*assigned, ("bias", bias)):
        if value is not None and value.device != x.device:
            raise LlmqError(f"all tensors must be on one device; x is on {x.device}, {name} on {value.device}")


def _launch(
    x: Tensor,
    rows: Tensor | None,
    weight: GroupedWeight,
    bias: Tensor | None,
    y: Tensor,
    blocks: Blocks,
    launch: Launch,
) -> None:
    import triton.language as tl

    from llmq.kernels._grouped import wna16_grouped

    count, row_tiles, tiles = weight.words.shape[:3]
    if row_tiles % (launch.bn // 64):
        raise LlmqError(f"bn must divide the padded out_features {64 * row_tiles}; got {launch.bn}; use 64")
    scales = weight.scales.view(torch.int32)
    zeros = scales if weight.zeros is None else weight.zeros.view(torch.int32)
    at = blocks.order if rows is None else rows.to(torch.int32).contiguous()
    wna16_grouped[(row_tiles * 64 // launch.bn, blocks.experts.shape[0])](
        x, weight.words, scales, zeros, y if bias is None else bias, y,
        blocks.experts.contiguous(), blocks.order.contiguous(), blocks.first, blocks.last, at,
        weight.out_features, x.shape[1], x.stride(0) if x.shape[0] > 1 else x.shape[1], tiles, scales.shape[1], count,
        BM=launch.bm, BN=launch.bn, STAGES=launch.stages, BITS=weight.bits,
        GROUP=0 if weight.group_size == weight.in_features else weight.group_size,
        SYMMETRIC=weight.zeros is None, BIAS=bias is not None, RAGGED=x.shape[1] % layout.TILE_K != 0,
        SCALE=tl.float16 if weight.scales.dtype == torch.float16 else tl.bfloat16, FORM=launch.form,
        PAIRS=blocks.pairs, ROWS=rows is not None,
        **compiler_options(wna16.device_of(x.device).arch, launch),
    )  # fmt: skip


@torch.library.custom_op(
    "llmq::wna16_grouped",
    mutates_args=(),
    schema="(Tensor x, Tensor experts, Tensor? rows, Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int out_features, int in_features, int bits, int group_size) -> Tensor",
)
def _forward(
    x: Tensor, experts: Tensor, rows: Any, words: Tensor, scales: Tensor, zeros: Any, bias: Any, *sizes: int
) -> Tensor:
    return launched(x, experts, rows, GroupedWeight(words, scales, zeros, *sizes), bias)


@_forward.register_fake
def _(
    x: Tensor, experts: Tensor, rows: Any, words: Tensor, scales: Tensor, zeros: Any, bias: Any, n: int, *sizes: int
) -> Tensor:
    return x.new_empty(experts.shape[0], n)
