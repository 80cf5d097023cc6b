"""Scales for rounding to nearest, chosen with the whole Hessian by coordinate descent over the groups.

The Hessian's diagonal says what the error of one column costs by itself. A layer loses tr(E H E^T), where E is the error of
its rounded weight: errors of columns with correlated inputs add up or cancel. Starting from the scales of
`llmq.methods.scales.search` (with every third ratio), the groups are visited in order, and each takes the scale near its own
(`FACTORS`, both signs; three zero points where there are any) with the least

    e H_gg e^T + 2 e r,     r = sum over the other groups h of e_h H_hg

which is the loss with all other groups fixed, so it never increases. Codes are still the nearest ones for each scale: of 30
ways to round 64 weights, one leaves an error that the other groups cancel.

Output error of 16 linears of SmolLM2-135M in general position (4 bits), as a share of the diagonal search's, on the 6 fitted
windows and on 6 others: g64 0.59, 0.66 (asymmetric 0.58, 0.66); g128 0.75, 0.83. With eleven factors instead of fifteen: 0.60,
0.67. Starting from all ratios: 0.59, 0.66, in 1.5 times the time. A second sweep gains 5% more in twice the time.
GPTQ cancels errors itself: on these scales its error was 1 to 3% higher, so it keeps the diagonal search.
Left out: groups wider than `WIDEST` columns (per channel), whose products would cost more than GPTQ. They keep the scales of
the diagonal search.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq.core.grid import Grid, checked_scale, quantize
from llmq.methods.scales import clamped, search

WIDEST = 256
FACTORS = tuple(1.14 - 0.02 * step for step in range(15))
STEP = 3
PANEL = 1024  # rows at a time; they are independent


def search_jointly(
    weight: Tensor, grid: Grid, dtype: torch.dtype, hessian: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """As `llmq.methods.scales.search`, weighed by the whole of `hessian`.

    weight: float32 [N, K]. hessian: float32 [K, K]. damping: share of its mean diagonal added to the diagonal.
    Returns scale [N, G] in `dtype` and zero uint8 [N, G], None when symmetric.
    """
    if grid.columns_per_group(weight.shape[1]) > WIDEST:
        return search(weight, grid, dtype, hessian.diagonal())
    scale, zero = search(weight, grid, dtype, hessian.diagonal(), STEP)
    added = damping * float(hessian.diagonal().mean())
    for start in range(0, len(weight), PANEL):
        rows = slice(start, start + PANEL)
        _descend(weight[rows], grid, hessian, added, scale[rows], None if zero is None else zero[rows])
    return scale, zero


def _descend(weight: Tensor, grid: Grid, hessian: Tensor, added: float, scale: Tensor, zero: Tensor | None) -> None:
    """One sweep over the groups of weight [n, K]; scale and zero [n, G] are changed in place."""
    lost = quantize(weight, scale, zero, grid).dequantize(torch.float32).sub_(weight)  # E
    size = grid.columns_per_group(weight.shape[1])
    for group in range(scale.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        own = hessian[columns, columns].clone()
        others = torch.mm(lost, hessian[:, columns]).sub_(lost[:, columns] @ own).mul_(2)  # 2 r [n, g]
        own.diagonal().add_(added)
        best = _cost(lost[:, columns], own, others)
        chosen, offset = scale[:, group], None if zero is None else zero[:, group]
        part = weight[:, columns].contiguous()
        for error, candidate, shifted in _around(
            part, chosen.clone(), None if offset is None else offset.clone(), grid
        ):
            cost = _cost(error, own, others)
            better = cost < best
            best = torch.where(better, cost, best)
            chosen.copy_(torch.where(better, candidate, chosen))
            if offset is not None and shifted is not None:
                offset.copy_(torch.where(better, shifted, offset))
        fixed = quantize(part, chosen.unsqueeze(1), None if offset is None else offset.unsqueeze(1), grid)
        lost[:, columns] = fixed.dequantize(torch.float32).sub_(part)


def _around(
    weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Candidates near scale and zero [n] for one group's weight [n, g]: (error [n, g], scale [n], zero [n] or None).

    Symmetric: both signs of each scale. Asymmetric: the zero point that keeps the range's place, and one to each side.
    """
    steps, codes, error = (torch.empty_like(weight) for _ in range(3))
    factors = torch.tensor(FACTORS, dtype=torch.float32, device=scale.device).unsqueeze(1)
    candidates = checked_scale(scale.abs().float() * factors, scale.dtype)  # [F, n]
    for factor, candidate in zip(FACTORS, candidates, strict=True):
        wide = candidate.float().unsqueeze(1)
        torch.div(weight, wide, out=steps)
        torch.round(steps, out=codes)
        nearest = None if zero is None else (zero.float() / factor).round_()
        for lost, sign, shifted in clamped(codes, steps, nearest, grid, error):
            yield lost.mul_(wide), candidate * sign, shifted


def _cost(error: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """e H_gg e^T + 2 e r of each row of e [n, g]."""
    cost: Tensor = torch.linalg.vecdot(torch.addmm(others, error, own), error)
    return cost
