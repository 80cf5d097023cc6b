"""Round to nearest: each weight to its nearest code. The baseline of the field where there is no data.

Where a Hessian is given (by AWQ, whose rounding this is) searched scales are chosen with the whole of it (`llmq.methods.joint`).
"""

from __future__ import annotations

from torch import Tensor

from llmq.blocks.statistics import Statistics
from llmq.core.grid import quantize
from llmq.methods.base import Rounded, Target
from llmq.methods.joint import search_jointly
from llmq.methods.scales import fit_scales


def rtn(weight: Tensor, statistics: Statistics | None, target: Target) -> Rounded:
    """Round weight float32 [N, K] to its nearest codes. statistics: None without data."""
    if statistics is not None and target.scales == "search":
        scale, zero = search_jointly(weight, target.grid, target.dtype, statistics.hessian, target.damping)
    else:
        scale, zero = fit_scales(target.scales)(weight, target.grid, target.dtype, None)
    return Rounded(quantize(weight, scale, zero, target.grid))
