"""Choosing scales and zero points: from the range of the weights, or by search (other tools call it clipping).

`minmax` covers each group's range exactly. `search` tries a grid of candidates per group and keeps the one with the
least weighted squared error

    sum_k importance[k] * (w[k] - dequantize(quantize(w[k])))**2

where importance is the diagonal of the Hessian (the mean square of input k), or 1 without data. Candidates are rounded
to the storage dtype first, so what is compared is what is stored. All of them are relative to the group's range:

    symmetric    scale = sign * ratio * max|w| / 2**(bits - 1), both signs, ratio from 1.15 down to 0.5: a ratio of 1 with
                 the sign against the largest weight is the signed full-range scale, 16/15 is the min-max scale
    asymmetric   the range [ratio * min, ratio * max], ratio from 1 down to 0.5, zero point nearest and one to each side

Without data, only ratios that clip almost nothing are tried (symmetric above 1.02, asymmetric above 0.97). With all columns
weighted alike, the squared error is lowest when some of the largest weights are clipped, and the model gets worse.
Perplexity of RTN on SmolLM2-135M in general position (g64, bfloat16 scales): min-max 38.2, all ratios 39.7, above 1.02 33.7;
min-max with float16 scales 37.4. With the Hessian's weights it is the other way round: KL of GPTQ with ratios above 0.84 is
0.198, with all of them 0.184.

Groups are processed in slabs of a few hundred kilobytes, so that the five or so passes per candidate stay in the cache. Errors
are measured in steps (t = w / scale, error = clamp(round(t)) - t), so that both signs share one division and rounding.
Left out: gradient or closed-form refinement of the best candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmq.core.grid import Grid, checked_scale, fit, grouped, zero_for

SYMMETRIC_RATIOS = tuple(1.15 - 0.65 * step / 26 for step in range(27))
ASYMMETRIC_RATIOS = tuple(1.0 - 0.5 * step / 20 for step in range(21))
ZERO_SHIFTS = (0, -1, 1)
UNCLIPPED_SYMMETRIC = tuple(ratio for ratio in SYMMETRIC_RATIOS if ratio > 1.02)
UNCLIPPED_ASYMMETRIC = tuple(ratio for ratio in ASYMMETRIC_RATIOS if ratio > 0.97)
SLAB_ELEMENTS = 1 << 17
GPU_SLAB_ELEMENTS = 1 << 24

FitScales = Callable[[Tensor, Grid, torch.dtype, "Tensor | None"], tuple[Tensor, "Tensor | None"]]


def minmax(
    weight: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales that just cover each group's range; `importance` is not used. See `llmq.core.grid.fit`."""
    return fit(weight, grid, dtype)


def search(
    weight: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None, step: int = 1
) -> tuple[Tensor, Tensor | None]:
    """The candidate of least weighted squared error in each group.

    weight: [N, K] floating. importance: [K], not negative; None weights all columns alike and clips almost nothing.
    step: evaluate every `step`-th ratio.
    Returns scale [N, G] in `dtype` and zero uint8 [N, G], None when symmetric. Ties go to the earlier candidate.
    """
    groups = grouped(weight.float(), grid)  # [N, G, g]
    rows, count, size = groups.shape
    root = torch.ones(count, size, dtype=torch.float32) if importance is None else _root(importance).view(count, size)
    root = root.to(groups.device)
    scale = torch.empty(rows, count, dtype=dtype, device=groups.device)
    zero = None if grid.symmetric else torch.empty(rows, count, dtype=torch.uint8, device=groups.device)
    errors_of = _symmetric if grid.symmetric else _asymmetric
    ratios = torch.tensor(_ratios(grid, importance is not None)[::step], dtype=torch.float64, device=groups.device)
    elements = SLAB_ELEMENTS if groups.device.type == "cpu" else GPU_SLAB_ELEMENTS
    height = max(1, elements // (count * size))
    for start in range(0, rows, height):
        slab = slice(start, start + height)
        errors, scales, zeros = errors_of(groups[slab], root, grid, dtype, ratios)
        best = errors.nan_to_num_(nan=torch.inf).argmin(0, keepdim=True)  # the first of equals
        scale[slab] = scales.gather(0, best)[0]
        if zero is not None and zeros is not None:
            zero[slab] = zeros.gather(0, best)[0]
    return scale, zero


SEARCHES: tuple[tuple[str, FitScales], ...] = (("minmax", minmax), ("search", search))


def fit_scales(name: str) -> FitScales:
    """The scale choice called `name` (`minmax` or `search`)."""
    return dict(SEARCHES)[name]


def _ratios(grid: Grid, weighted: bool) -> tuple[float, ...]:
    if grid.symmetric:
        return SYMMETRIC_RATIOS if weighted else UNCLIPPED_SYMMETRIC
    return ASYMMETRIC_RATIOS if weighted else UNCLIPPED_ASYMMETRIC


def _root(importance: Tensor) -> Tensor:
    """Square root of the weights of the error, in units of their mean; dead columns keep a little weight."""
    mean = importance.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (importance / mean).clamp_min_(1e-6).sqrt_()


Candidates = tuple[Tensor, Tensor, "Tensor | None"]
"""Errors float32 [C, n, G], scales [C, n, G] and zeros uint8 [C, n, G] (None where symmetric) of C candidates."""


def _symmetric(groups: Tensor, root: Tensor, grid: Grid, dtype: torch.dtype, ratios: Tensor) -> Candidates:
    """The symmetric candidates for groups [n, G, g]: both signs of each ratio [R] in turn."""
    largest = groups.abs().amax(-1) / grid.middle
    scales = checked_scale(largest * ratios.view(-1, 1, 1).float(), dtype)  # [R, n, G]
    errors = _errors(groups, root, grid, scales, None)
    signed = torch.stack((scales, -scales), 1)  # [R, 2, n, G]
    return errors, signed.flatten(0, 1), None


def _asymmetric(groups: Tensor, root: Tensor, grid: Grid, dtype: torch.dtype, ratios: Tensor) -> Candidates:
    """The asymmetric candidates for groups [n, G, g]: three zero points for each ratio [R] in turn."""
    low = groups.amin(-1).clamp_(max=0)
    high = groups.amax(-1).clamp_(min=0)
    spread = ratios.view(-1, 1, 1)
    scales = checked_scale((high - low) * (spread / grid.levels).float(), dtype)  # [R, n, G]
    nearest = zero_for(low * spread.float(), scales, grid).float()  # [R, n, G]
    shifts = torch.tensor(ZERO_SHIFTS, dtype=torch.float32, device=groups.device).view(-1, 1, 1)
    zeros = (nearest.unsqueeze(1) + shifts).clamp_(0, grid.levels).to(torch.uint8)  # [R, 3, n, G]
    errors = _errors(groups, root, grid, scales, nearest)
    return errors, scales.unsqueeze(1).expand(zeros.shape).flatten(0, 1), zeros.flatten(0, 1)


def _errors(groups: Tensor, root: Tensor, grid: Grid, scales: Tensor, nearest: Tensor | None) -> Tensor:
    """Weighted squared errors [C, n, G] of groups [n, G, g] with scales and nearest zero points [R, n, G]."""
    steps, codes, error = (torch.empty_like(groups) for _ in range(3))
    found = []
    for index, scale in enumerate(scales):
        wide = scale.float()
        torch.div(groups, wide.unsqueeze(-1), out=steps)
        torch.round(steps, out=codes)
        for lost, _, _ in clamped(codes, steps, None if nearest is None else nearest[index], grid, error):
            found.append(_distance(lost, root, wide))
    return torch.stack(found)


def clamped(
    codes: Tensor, steps: Tensor, nearest: Tensor | None, grid: Grid, out: Tensor
) -> Iterator[tuple[Tensor, int, Tensor | None]]:
    """(error in steps, sign of the scale, zero point or None) of each candidate range for steps = w / scale [.., g].

    codes: the steps, rounded. nearest: float zero points [..]; None where symmetric. Symmetric candidates are both signs of
    the scale, which have their extra code at opposite ends; asymmetric ones are the zero point and its two neighbours.
    out: [.., g], overwritten by the next candidate.
    """
    if nearest is None:
        for sign, low in ((1, -grid.middle), (-1, 1 - grid.middle)):
            torch.clamp(codes, low, low + grid.levels, out=out)
            yield out.sub_(steps), sign, None
        return
    for shift in ZERO_SHIFTS:
        zero = (nearest + shift).clamp_(0, grid.levels)
        torch.clamp(codes, -zero.unsqueeze(-1), (grid.levels - zero).unsqueeze(-1), out=out)
        yield out.sub_(steps), 1, zero.to(torch.uint8)


def _distance(lost: Tensor, root: Tensor, scale: Tensor) -> Tensor:
    """Weighted squared error [n, G] of errors in steps, which are overwritten. scale: float32 [n, G]."""
    error = torch.linalg.vector_norm(lost.mul_(root), dim=-1)
    weighted: Tensor = error.mul_(scale).square_()  # a sign disappears in the square
    return weighted
