"""What a rounding is: a pure function of a weight and the second moment of its inputs.

    rounding(weight [N, K], hessian [K, K] or None, target) -> Rounded

Rows are independent of each other in every method, so the linears that read the same input are rounded as one stacked
weight and taken apart afterwards: same bytes, one factorization, one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight


@dataclass(frozen=True)
class Target:
    """What a weight is rounded to.

    grid: bits, group size, symmetry.
    dtype: the dtype in which scales are stored.
    scales: `minmax` or `search` (`llmq.methods.scales`).
    damping: share of the mean diagonal added to the Hessian.
    """

    grid: Grid
    dtype: torch.dtype
    scales: str
    damping: float


@dataclass(frozen=True)
class Rounded:
    """A quantized weight, and whatever was out of the ordinary on the way to it (each a line of the report)."""

    weight: QuantizedWeight
    notes: tuple[str, ...] = ()


PANEL = 512  # rows whose error is measured at a time

Rounding = Callable[[Tensor, Tensor | None, Target], Rounded]


def output_errors(weight: Tensor, candidates: Sequence[QuantizedWeight], hessian: Tensor | None) -> list[float]:
    """||(W - Q) X||^2 / ||W X||^2 of each Q, from H = X X^T / tokens; with no Hessian, the same of the weights alone.

    weight: float32 [N, K]; hessian: float32 [K, K]. Ratios; 0 for a weight that produces no output at all. Some rows at
    a time, so that no second [N, K] tensor is made.
    """
    total, lost = 0.0, [0.0] * len(candidates)
    for start in range(0, len(weight), PANEL):
        rows = weight[start : start + PANEL]
        total += _energy(rows, hessian)
        for index, quantized in enumerate(candidates):
            error = quantized.rows(start, start + len(rows)).dequantize(torch.float32).sub_(rows)
            lost[index] += _energy(error, hessian)
    return [value / total if total > 0 else 0.0 for value in lost]


def _energy(weight: Tensor, hessian: Tensor | None) -> float:
    return float((weight * (weight if hessian is None else weight @ hessian)).sum(dtype=torch.float64))
