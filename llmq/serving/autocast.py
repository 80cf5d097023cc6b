"""Inputs in the dtype that autocast asks for."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_by_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is enabled, as torch's own linear casts it; float64 is never cast."""
    if (
        x.is_meta
        or not torch.is_autocast_enabled(x.device.type)
        or not x.is_floating_point()
        or x.dtype == torch.float64
    ):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
