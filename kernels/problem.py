"""What a kernel is asked to do, as values: the problem that decides which kernel runs, and the packed tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A packed matmul y [M, N] = x [M, K] @ W^T, without data.

    rows, columns: N and K. group_size: columns per scale (K per channel). dtype: of x. device: its type (`cpu`, ...).
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Packed:
    """The tensors of one packed weight in the checkpoint's layout (`llmq.formats.compressed_tensors`).

    weight: int32 [N, ceil(K * bits / 32)]; scale [N, G]; zero: int32 [ceil(N * bits / 32), G], None when symmetric.
    """

    problem: Problem
    weight: Tensor
    scale: Tensor
    zero: Tensor | None
