"""Round to nearest: each weight to its nearest code, on scales found without data. The baseline of the field."""

from __future__ import annotations

from torch import Tensor

from llmq.core.grid import quantize
from llmq.methods.base import Rounded, Target
from llmq.methods.scales import fit_scales


def rtn(weight: Tensor, hessian: Tensor | None, target: Target) -> Rounded:
    """weight [N, K] -> its nearest codes. `hessian` plays no part: the method is data-free."""
    scale, zero = fit_scales(target.scales)(
        weight, target.grid, target.dtype, None if hessian is None else hessian.diagonal()
    )
    return Rounded(quantize(weight, scale, zero, target.grid))
