"""What a rounding is: a pure function of a weight and the statistics of its inputs.

    rounding(weight [N, K], statistics or None, target) -> Rounded

Rows are independent of each other in every method, so the linears that read the same input are rounded as one stacked
weight and taken apart afterwards: the same codes, from one factorization and one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.blocks.statistics import Statistics
from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight

SAMPLED_ROWS = 128
"""Rows of a weight that errors are estimated from."""


@dataclass(frozen=True)
class Target:
    """What a weight is rounded to.

    Fields:
        grid: bits, group size, symmetry.
        dtype: the dtype in which scales are stored.
        scales: `minmax` or `search` (`llmq.methods.scales`).
        damping: share of the mean diagonal that is added to the Hessian's diagonal.
    """

    grid: Grid
    dtype: torch.dtype
    scales: str
    damping: float


@dataclass(frozen=True)
class Rounded:
    """A quantized weight, and a line for the report for everything unusual on the way to it."""

    weight: QuantizedWeight
    notes: tuple[str, ...] = ()


Rounding = Callable[[Tensor, "Statistics | None", Target], Rounded]


def sampled_rows(count: int, device: torch.device) -> Tensor:
    """The numbers of at most `SAMPLED_ROWS` of `count` rows, evenly spaced: int64."""
    rows = min(SAMPLED_ROWS, count)
    return torch.arange(rows, device=device) * count // rows


def output_errors(weight: Tensor, candidates: Sequence[QuantizedWeight], hessian: Tensor | None) -> list[float]:
    """||(W - Q) X||^2 / ||W X||^2 of each Q, from H = X X^T / tokens; without a Hessian, the same of the weights alone.

    weight: float32 [N, K]; candidates: of the same rows. hessian: float32 [K, K]. Returns ratios; 0 for a weight that
    produces no output at all.
    """
    total = _energy(weight, hessian)
    lost = [_energy(quantized.dequantize(torch.float32).sub_(weight), hessian) for quantized in candidates]
    return [value / total if total > 0 else 0.0 for value in lost]


def _energy(weight: Tensor, hessian: Tensor | None) -> float:
    return float((weight * (weight if hessian is None else weight @ hessian)).sum(dtype=torch.float64))
