"""Dequantize a slab of output rows, multiply, go on: any width, any device, many rows of x. Differentiable in x.

The dense weight never exists whole: one slab of about `SLAB` elements does, in x's dtype. Codes are taken apart byte by
byte (`llmq.core.packing`), which is several times faster on CPUs than shifting int32 words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.core.packing import unpack
from llmq.kernels.problem import Packed, Problem

NAME = "slab"
SLAB = 1 << 20


def refusal(problem: Problem) -> str | None:
    """It refuses nothing."""
    return None


def prepare(packed: Packed) -> Packed:
    """It reads the checkpoint's own layout."""
    return packed


def run(x: Tensor, packed: Packed) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype."""
    problem = packed.problem
    zeros = None if packed.zero is None else unpack(packed.zero.T.contiguous(), problem.bits, problem.rows).T
    step = max(1, SLAB // problem.columns)
    parts = [
        x @ slab(packed, zeros, start, min(start + step, problem.rows), x.dtype).T
        for start in range(0, problem.rows, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def slab(packed: Packed, zeros: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start .. stop - 1 of the dequantized weight, [stop - start, K]; the product of code and scale is in float32."""
    problem = packed.problem
    codes = unpack(packed.weight[start:stop], problem.bits, problem.columns)
    # Differences of 8-bit codes need 9 bits; those of fewer fit the codes' own bytes.
    groups = (codes.to(torch.int16) if problem.bits == 8 else codes.view(torch.int8)).view(
        stop - start, -1, problem.group_size
    )
    middle = 1 << (problem.bits - 1)
    groups.sub_(middle if zeros is None else zeros[start:stop].unsqueeze(-1).to(groups.dtype))
    return groups.float().mul_(packed.scale[start:stop].float().unsqueeze(-1)).view(stop - start, -1).to(dtype)
