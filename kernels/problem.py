"""The input of a kernel, as values: the matmul to run (`Problem`) and the tensors of one weight (`Packed`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A packed matmul y [M, N] = x [M, K] @ W^T: everything that decides which kernel runs it, except M."""

    out_features: int
    """N."""
    in_features: int
    """K."""
    bits: int
    """Bits of one weight code."""
    group_size: int
    """Columns that share one scale; K for one scale per channel."""
    symmetric: bool
    """True if the weight has no zero points."""
    scale_dtype: torch.dtype
    """The dtype of the stored scales."""
    dtype: torch.dtype
    """The dtype of x and y."""
    device: str
    """The device type: `cpu`, `cuda`, ..."""
    offloaded: bool = False
    """True if the weight is loaded for each call (accelerate's offloading), so that no layout made of it may be kept."""


@dataclass(frozen=True)
class Packed:
    """The stored tensors of one weight W ~ (code - zero) * scale, all on one device.

    This is the layout of compressed-tensors' `pack-quantized`. The slab and reference kernels run it as it is.
    """

    out_features: int
    """N."""
    in_features: int
    """K."""
    bits: int
    """Bits of one weight code."""
    group_size: int
    """Columns that share one scale; K for one scale per channel."""
    weight: Tensor
    """int32 [N, ceil(K * bits / 32)]: codes packed along K, lowest bits first."""
    scale: Tensor
    """Floating [N, K / group_size]."""
    zero: Tensor | None
    """int32 [ceil(N * bits / 32), K / group_size]: zero points packed along N. None if symmetric: then 2**(bits - 1)."""
    parts: tuple[Packed, ...] = ()
    """The stored weights that were concatenated along N to make this one (`llmq.serving.fused`); empty otherwise."""

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight."""
        return 1 << (self.bits - 1)
