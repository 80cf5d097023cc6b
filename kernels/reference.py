"""The specification of a packed matmul: unpack, dequantize in float32, multiply. Slow, any device, any width.

    y = x @ ((codes - zero) * scale)^T + bias

Its unpack is its own (bit by bit, on int64), so that it can judge both the packing of `llmq.core` and every kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.kernels.problem import Packed, Problem

NAME = "reference"


def refusal(problem: Problem) -> str | None:
    """It refuses nothing."""
    return None


def prepare(packed: Packed) -> Packed:
    """It reads the checkpoint's own layout."""
    return packed


def run(x: Tensor, packed: Packed) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype, computed in float32."""
    return (x.float() @ dequantize(packed).T).to(x.dtype)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] in `dtype`, computed in it."""
    problem = packed.problem
    codes = unpack(packed.weight, problem.bits, problem.columns).to(dtype)
    if packed.zero is None:
        zero = torch.full_like(packed.scale, 1 << (problem.bits - 1), dtype=dtype)
    else:
        zero = unpack(packed.zero.T, problem.bits, problem.rows).T.to(dtype)
    size = problem.columns // packed.scale.shape[1]
    spread = [t.to(dtype).repeat_interleave(size, 1) for t in (zero, packed.scale)]  # [N, K]
    return (codes - spread[0]) * spread[1]


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] -> int64 codes [R, count]: bit i of code c is bit c * bits + i of the row."""
    position = torch.arange(count * bits, device=words.device)
    stream = (words.long()[:, position // 32] >> (position % 32)) & 1  # [R, count * bits]
    weight = 1 << torch.arange(bits, device=words.device)
    return (stream.view(-1, count, bits) * weight).sum(-1)
