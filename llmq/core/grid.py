"""The affine grid of a weight, weight ~ (code - zero) * scale: fit it, quantize on it.

Three kinds of grid, at 2, 3, 4 or 8 bits, each per channel or per group:

    asymmetric          scale > 0, zero in 0 .. 2**bits - 1, chosen so that the group's range, extended to include 0, is
                        covered
    symmetric           zero is the middle code 2**(bits - 1), scale = max|w| / (2**bits - 1) * 2 > 0
    signed full range   symmetric with a signed scale: the largest |w| gets code 0 (value -2**(bits - 1)), which is one
                        code more on that side than a positive scale offers

Zero is always exactly representable. Scales are rounded to their storage dtype *before* any code is computed, so the
codes are the nearest ones for the stored scale. Nothing downstream recomputes them.

A group of zeros gets scale 1. A scale that its storage dtype rounds to zero or to a denormal is raised to the smallest
normal number (GPUs flush denormals). `checked_scale` refuses one that overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError


@dataclass(frozen=True)
class Grid:
    """The affine grid that every group of a weight shares."""

    bits: int
    """2, 3, 4 or 8."""
    group_size: int | None
    """Columns per group; None for one group per row (per channel)."""
    symmetric: bool
    """Whether there is no zero point."""

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """Columns per group of a weight with `in_features` columns. Raises `LlmqError` unless groups divide them."""
        if self.group_size is None:
            return in_features
        if in_features % self.group_size:
            raise LlmqError(f"group_size must divide in_features {in_features}; got {self.group_size}")
        return self.group_size


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """A view [N, G, g] of a weight [N, K]."""
    return weight.reshape(weight.shape[0], -1, grid.columns_per_group(weight.shape[1]))


def checked_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in its storage dtype, neither zero nor denormal.

    A scale of exactly 0 (a group of zeros) becomes 1. Any other keeps its sign. Raises `LlmqError` if `dtype` overflows.
    """
    limits = torch.finfo(dtype)
    stored = scale.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        worst = scale.abs().max().item()
        raise LlmqError(
            f"a scale of {worst:g} does not fit in {dtype}, whose largest value is {limits.max:g}; use bfloat16"
        )
    tiny = torch.copysign(torch.full_like(stored, limits.tiny), stored)
    stored = torch.where(stored.abs() < limits.tiny, tiny, stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def fit(weight: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Min-max scales and zero points: each group's range is just covered.

    weight: [N, K] floating, finite. Returns scale [N, G] in `dtype`, and zero uint8 [N, G] or None when symmetric. The
    symmetric scale is max|w| / (levels / 2), the convention of compressed-tensors.
    """
    groups = grouped(weight.float(), grid)
    if grid.symmetric:
        return checked_scale(groups.abs().amax(-1) / (grid.levels / 2), dtype), None
    low = groups.amin(-1).clamp_(max=0)
    high = groups.amax(-1).clamp_(min=0)
    scale = checked_scale((high - low) / grid.levels, dtype)
    return scale, zero_for(low, scale, grid)


def zero_for(low: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Zero points uint8 [N, G] that map `low` to code 0. low (<= 0), scale: [N, G]."""
    return (-low / scale.float()).round_().clamp_(0, grid.levels).to(torch.uint8)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> QuantizedWeight:
    """Round a weight [N, K] to the nearest codes of the grid that `scale` and `zero` (as `fit` returns them) span.

    The division is IEEE float32. Ties go to the even code. Values outside the range are clamped to it.
    """
    groups = grouped(weight.float(), grid)
    offset = grid.middle if zero is None else zero.float().unsqueeze(-1)
    codes = (groups / scale.float().unsqueeze(-1)).round_().add_(offset).clamp_(0, grid.levels)
    return QuantizedWeight(
        codes.to(torch.uint8).view(weight.shape), scale, zero, grid.columns_per_group(weight.shape[1]), grid.bits
    )


def clipped_share(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Share (0 to 1) of a weight's [N, K] values that lie more than half a step outside the range of the grid."""
    rows = weight.shape[0]
    levels, middle = (1 << quantized.bits) - 1, 1 << (quantized.bits - 1)
    zero = middle if quantized.zero is None else quantized.zero.float().unsqueeze(-1)
    steps = weight.float().view(rows, -1, quantized.group_size) / quantized.scale.float().unsqueeze(-1) + zero
    return float(((steps < -0.5) | (steps > levels + 0.5)).float().mean())
