"""The specification of a packed matmul: unpack bit by bit, dequantize and multiply in float32. Any width, any device.

    y = x @ ((code - zero) * scale)^T + bias

The unpack is its own, on int64 and one bit at a time, so that it can judge both `llmq.core.packing` and every kernel.
It needs 8 bytes for each stored bit: a yardstick, not a way to run a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.kernels.problem import Packed, Problem

NAME = "reference"
JOINS = False


def refusal(problem: Problem) -> str | None:
    """It takes everything."""
    return None


def most_rows(problem: Problem) -> int | None:
    """No limit."""
    return None


def launch_of(problem: Problem, rows: int, device: torch.device) -> str | None:
    """There is nothing to choose."""
    return None


def prepare(packed: Packed) -> Packed:
    """It reads the stored layout."""
    return packed


def run(x: Tensor, packed: Packed, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [M, K] -> y [M, N] in x's dtype, computed in `dtype` (float32 or float64) throughout and rounded once."""
    y = x.to(dtype) @ dequantize(packed, dtype).T
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K], computed in `dtype`."""
    codes = unpack(packed.weight, packed.bits, packed.columns).to(dtype)  # [N, K]
    zero = torch.full_like(packed.scale, packed.middle, dtype=dtype)  # [N, G]
    if packed.zero is not None:
        zero = unpack(packed.zero.T, packed.bits, packed.rows).T.to(dtype)
    spread = [values.to(dtype).repeat_interleave(packed.group_size, 1) for values in (zero, packed.scale)]  # [N, K]
    return (codes - spread[0]) * spread[1]


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] -> int64 codes [R, count]: bit i of code c is bit c * bits + i of the row."""
    position = torch.arange(count * bits, device=words.device)
    stream = (words.long()[:, position // 32] >> (position % 32)) & 1  # [R, count * bits]
    weight = 1 << torch.arange(bits, device=words.device)
    return (stream.view(-1, count, bits) * weight).sum(-1)
