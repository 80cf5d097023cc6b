"""GPTQ: rounding with second-order error feedback (Frantar et al., arXiv 2210.17323), static groups, activation order.

Columns are rounded one by one; the error of each is spread over the columns still to come so that the output of the
layer on the calibration inputs changes least. Here

    scales first     found once per group from the original weights, weighted by the Hessian's diagonal; the feedback
                     then works against a fixed grid ("static groups"), so groups stay contiguous in memory whatever
                     order the columns are rounded in, and no g_idx is needed on disk
    order            columns by decreasing diagonal of H (the "act-order" of the reference code)
    factor           the paper's Cholesky factor of H^-1 (section 3.3, step 3), but from one Cholesky of H with the
                     columns reversed and one triangular inverse: H^-1 itself is never formed
    lazy updates     blocks of 128 columns; the remaining columns are updated once per block, in one product (step 2)
    layout           the weight is worked on transposed, [K, N], so that a column is contiguous and every row of the
                     weight is one lane

A Hessian that is not numerically positive definite gets ten and a hundred times the damping, then the same in float64. Each
step is a note in the result; no other method is used instead. Dead inputs (zero diagonal) take no part in the feedback
and are rounded to nearest.
Left out: fitting scales again after rounding, and the cross term of GPTAQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.blocks.statistics import Statistics
from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.methods.base import Rounded, Target
from llmq.methods.scales import fit_scales

BLOCK = 128
LEAF = 256
PIECE = 1 << 20
DAMPING_FACTORS = (1, 10, 100)


def gptq(weight: Tensor, statistics: Statistics | None, target: Target) -> Rounded:
    """Round weight float32 [N, K] with error feedback against the Hessian of `statistics`, which is not changed.

    Raises `LlmqError` when there are no statistics, or the Hessian cannot be factored at any damping.
    """
    if statistics is None:
        raise LlmqError("gptq needs calibration data: it rounds against the second moment of the inputs")
    hessian = statistics.hessian
    diagonal = hessian.diagonal()
    scale, zero = fit_scales(target.scales)(weight, target.grid, target.dtype, diagonal)
    order = torch.argsort(diagonal, descending=True, stable=True)
    factor, notes = inverse_factor(hessian, order, target.damping)
    codes = round_with_feedback(weight, factor, order, scale, zero, target.grid)
    size = target.grid.columns_per_group(weight.shape[1])
    return Rounded(QuantizedWeight(codes, scale, zero, size, target.grid.bits), notes)


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, tuple[str, ...]]:
    """Upper triangular U with U^T U = (H' + damping * mean(diag H) * I)^-1, where H' is H in `order`; and notes.

    hessian: symmetric float32 [K, K], not changed. Dead columns get the mean diagonal, which decouples them from the rest.
    Reversing rows and columns turns the lower Cholesky factor of H' into an upper A with A A^T = H'; then U = A^-1.
    Everything is done in place: at most 1.5 K x K matrices are in memory besides H.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    notes: tuple[str, ...] = (f"{int(dead.sum())} dead inputs",) if bool(dead.any()) else ()
    mean = diagonal.sum(dtype=torch.float64).item() / max(1, int((~dead).sum())) or 1.0
    backward = order.flip(0)
    for dtype in (torch.float32, torch.float64):
        for factor in DAMPING_FACTORS:
            damped = hessian[backward.unsqueeze(1), backward].to(dtype).mT  # as LAPACK wants it: factored in place
            damped.diagonal().add_(damping * factor * mean).add_(dead[backward].to(dtype), alpha=mean)
            failed = torch.empty((), dtype=torch.int32, device=hessian.device)
            torch.linalg.cholesky_ex(damped, out=(damped, failed))
            if not bool(failed) and bool(torch.isfinite(damped.diagonal()).all()):
                _invert_lower(damped)
                _reverse(damped.mT)
                if bool(torch.isfinite(damped.sum())):
                    return damped.to(hessian.dtype), notes
            used = str(dtype).removeprefix("torch.")
            notes += (f"not positive definite at damping {damping * factor:g} in {used}",)
    raise LlmqError(
        f"the Hessian cannot be factored even with damping {damping * DAMPING_FACTORS[-1]:g} in float64: "
        "use more calibration text, or a larger `damping` in QuantConfig"
    )


def _invert_lower(matrix: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]."""
    size = len(matrix)
    if size <= LEAF:
        eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, eye, upper=False))
        return
    half = size // 2
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    solved = torch.linalg.solve_triangular(last, below, upper=False)
    below.copy_(torch.linalg.solve_triangular(first, solved, upper=False, left=False)).neg_()
    _invert_lower(first)
    _invert_lower(last)


def _reverse(matrix: Tensor) -> None:
    """Reverse the order of rows and of columns of a contiguous matrix in place, a piece from each end at a time."""
    flat = matrix.view(-1)
    half = len(flat) // 2
    for start in range(0, half, PIECE):
        stop = min(start + PIECE, half)
        front, back = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def round_with_feedback(
    weight: Tensor, factor: Tensor, order: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid
) -> Tensor:
    """Codes uint8 [N, K] of weight [N, K], columns taken in `order`; arXiv 2210.17323, algorithm 1.

    factor: U [K, K] of the reordered Hessian. scale, zero: [N, G], fixed beforehand.
    """
    rows, columns = weight.shape
    group = (order // grid.columns_per_group(columns)).tolist()
    S = scale.T.float().contiguous()  # [G, N]
    Z = torch.full_like(S, grid.middle) if zero is None else zero.T.float().contiguous()
    scales, lowest, highest = S.unbind(0), Z.neg().unbind(0), (grid.levels - Z).unbind(0)
    W = weight.T[order].contiguous()  # [K, N]
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    pivots = factor.diagonal().tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = W[start:stop]
        Q, E = (
            torch.empty_like(block),
            torch.empty_like(block),
        )  # [block, N]: codes less zero points, errors over pivots
        for i, (w, q, e) in enumerate(zip(block.unbind(0), Q.unbind(0), E.unbind(0), strict=True)):
            g = group[start + i]
            torch.div(w, scales[g], out=q).round_()
            torch.clamp(q, lowest[g], highest[g], out=q)
            torch.sub(w, torch.mul(q, scales[g], out=e), out=e).div_(pivots[start + i])
            block[i + 1 :].addr_(factor[start + i, start + i + 1 : stop], e, alpha=-1)
        W[stop:].addmm_(factor[start:stop, stop:].T, E, alpha=-1)
        codes[start:stop] = Q.add_(Z[group[start:stop]])
    in_memory = torch.empty_like(codes)
    in_memory[order] = codes
    return in_memory.T.contiguous()
