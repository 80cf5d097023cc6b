"""Round to nearest: each weight to its nearest code. The baseline of the field where there is no data.

Where a Hessian is given (by AWQ, whose rounding this is) searched scales are chosen with the whole of it (`llmq.methods.joint`).
"""

from __future__ import annotations

from torch import Tensor

from llmq.core.grid import quantize
from llmq.methods.base import Rounded, Target
from llmq.methods.joint import search_jointly
from llmq.methods.scales import fit_scales


def rtn(weight: Tensor, hessian: Tensor | None, target: Target) -> Rounded:
    """weight float32 [N, K] -> its nearest codes. hessian: float32 [K, K] (mean of x x^T over tokens), or None without data."""
    if hessian is not None and target.scales == "search":
        scale, zero = search_jointly(weight, target.grid, target.dtype, hessian, target.damping)
    else:
        scale, zero = fit_scales(target.scales)(weight, target.grid, target.dtype, None)
    return Rounded(quantize(weight, scale, zero, target.grid))
