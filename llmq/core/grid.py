"""The affine map  weight ~ (code - zero) * scale,  stated once: fit it, quantize on it, dequantize from it.

Three kinds of grid, at 2, 3, 4 or 8 bits, each per tensor, per channel or per group:

    asymmetric          scale > 0, zero in 0 .. 2**bits - 1, chosen so that [min, max] (stretched to hold 0) is covered
    symmetric           zero is the middle code 2**(bits - 1), scale = max|w| / (2**bits - 1) * 2 > 0
    signed full range   as symmetric, but the scale carries a sign so that the largest |w| gets code 0 (value -2**(bits-1)):
                        one code more on that side than the positive scale has

Zero is always representable exactly. Scales are rounded to their storage dtype *before* any code is computed, so the
codes are the nearest ones for the scale that is stored; nothing downstream computes them again.

A group of zeros gets scale 1. A scale that storage rounds to zero or to a denormal is raised to the dtype's smallest
normal number (GPUs flush denormals); one that overflows it is refused by `checked_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError


@dataclass(frozen=True)
class Grid:
    """What every group of a weight has in common.

    bits: 2, 3, 4 or 8.
    group_size: columns per group; None for one group per row; `per_tensor` overrides it with one group for everything.
    symmetric: no zero point is stored.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    per_tensor: bool = False

    @property
    def levels(self) -> int:
        """The number of codes less one: the largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """The group size in columns. Raises `LlmqError` where it does not divide `in_features`."""
        if self.group_size is None or self.per_tensor:
            return in_features
        if in_features % self.group_size:
            raise LlmqError(f"group_size must divide in_features {in_features}; got {self.group_size}")
        return self.group_size


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """A view [N, G, g] of a weight [N, K] ([1, 1, N * K] per tensor)."""
    if grid.per_tensor:
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], -1, grid.columns_per_group(weight.shape[1]))


def checked_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in its storage dtype, never zero nor denormal. Raises `LlmqError` where `dtype` cannot hold it.

    A scale of exactly 0 (a group of zeros) becomes 1; any other keeps its sign.
    """
    limits = torch.finfo(dtype)
    stored = scale.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        worst = scale.abs().max().item()
        raise LlmqError(f"a scale of {worst:g} does not fit in {dtype}, which ends at {limits.max:g}; use bfloat16")
    tiny = torch.copysign(torch.full_like(stored, limits.tiny), stored)
    stored = torch.where(stored.abs() < limits.tiny, tiny, stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def fit(weight: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that just cover each group's range (what the field calls min-max).

    weight: [N, K] floating, finite. Returns scale [N, G] in `dtype` and zero uint8 [N, G], None when symmetric
    ([1, 1] each per tensor). The symmetric scale is max|w| / (levels / 2), compressed-tensors' convention.
    """
    groups = grouped(weight.float(), grid)
    if grid.symmetric:
        return checked_scale(groups.abs().amax(-1) / (grid.levels / 2), dtype), None
    low = groups.amin(-1).clamp_(max=0)
    high = groups.amax(-1).clamp_(min=0)
    scale = checked_scale((high - low) / grid.levels, dtype)
    return scale, zero_for(low, scale, grid)


def fit_full_range(weight: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, None]:
    """Signed full-range symmetric scales: the largest |w| of each group gets code 0, whatever its sign.

    weight: [N, K]. Returns scale [N, G] in `dtype`, negative where that weight is positive.
    """
    groups = grouped(weight.float(), grid)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return checked_scale(-extreme / grid.middle, dtype), None


def zero_for(low: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The code of 0 when the code of `low` (<= 0) is to be 0. low, scale: [N, G]; returns uint8 [N, G]."""
    return (-low / scale.float()).round_().clamp_(0, grid.levels).to(torch.uint8)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> QuantizedWeight:
    """The nearest codes of a weight [N, K] on the grid of `scale` and `zero` (as `fit` returns them).

    The division is IEEE float32; ties go to the even code; values outside the range take its nearest end.
    """
    groups = grouped(weight.float(), grid)
    offset = grid.middle if zero is None else zero.float().unsqueeze(-1)
    codes = (groups / scale.float().unsqueeze(-1)).round_().add_(offset).clamp_(0, grid.levels)
    return QuantizedWeight(
        codes.to(torch.uint8).view(weight.shape), scale, zero, grid.columns_per_group(weight.shape[1]), grid.bits
    )


def clipped_share(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Share of weights [N, K] that lie outside the grid's range, more than half a step past its ends: 0 to 1."""
    rows = weight.shape[0]
    levels, middle = (1 << quantized.bits) - 1, 1 << (quantized.bits - 1)
    zero = middle if quantized.zero is None else quantized.zero.float().unsqueeze(-1)
    steps = weight.float().view(rows, -1, quantized.group_size) / quantized.scale.float().unsqueeze(-1) + zero
    return float(((steps < -0.5) | (steps > levels + 0.5)).float().mean())
