"""The specification of a packed matmul: unpack bit by bit, dequantize, multiply in float32. Any bit width, any device.

    y = x @ ((code - zero) * scale)^T + bias

The unpacking is written independently of `llmq.core.packing` (int64, one bit at a time), so that tests can compare both it
and every kernel with this file. It takes 8 bytes of memory for each stored bit: too slow to run a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.kernels.kernel import Kernel
from llmq.kernels.problem import Packed


def run(x: Tensor, packed: Packed, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [M, K] -> y [M, N] in x's dtype. Everything is computed in `dtype` (float32 or float64); y is rounded once."""
    y = x.to(dtype) @ dequantize(packed, dtype).T
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K], computed in `dtype`."""
    codes = unpack(packed.weight, packed.bits, packed.in_features).to(dtype)  # [N, K]
    zero = torch.full_like(packed.scale, packed.middle, dtype=dtype)  # [N, G]
    if packed.zero is not None:
        zero = unpack(packed.zero.T, packed.bits, packed.out_features).T.to(dtype)
    zero, scale = (
        values.to(dtype).repeat_interleave(packed.group_size, 1) for values in (zero, packed.scale)
    )  # [N, K]
    return (codes - zero) * scale


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] -> int64 codes [R, count]: bit i of code c is bit c * bits + i of the row."""
    position = torch.arange(count * bits, device=words.device)
    stream = (words.long()[:, position // 32] >> (position % 32)) & 1  # [R, count * bits]
    weight = 1 << torch.arange(bits, device=words.device)
    return (stream.view(-1, count, bits) * weight).sum(-1)


KERNEL = Kernel(name="reference", run=run)
