"""Dequantize some output rows (a slab), multiply, repeat. Any bit width, any device, many rows of x. Differentiable in x.

Only one slab of about `SLAB` weights is dense at a time, in x's dtype. On GPUs one Triton kernel makes it
(`llmq.kernels.dequant`), and slabs fit the second-level cache, where the matmul reads them. Elsewhere codes are unpacked
byte by byte (`llmq.core.packing`), which on CPUs is several times faster than shifting int32 words.
(code - zero) * scale is computed in float32, where it is exact, and rounded once to x's dtype. The result has the same bits
as `QuantizedWeight.dequantize`; it is faster than bfloat16 arithmetic, which converts for every operation.

Under autograd and torch.compile the loop is one operator, `llmq::slab_linear`: otherwise autograd would keep every slab for
the backward pass, and a compiler would unroll the loop. Left out: a gradient of the weight.

Measured on 2 cores of an AVX-512 x86 (EPYC 9004, torch 2.13), bfloat16, 4 bits in groups of 64: 0.23 ns per weight and
call, 10% of the matmul of 512 rows. Relative to a dense linear, a linear with 512 rows runs at 0.85 (4096 x 4096) to 0.91
(1536 x 576) of the speed, with 64 rows at 0.55 to 0.7, with 1 row at 0.28 to 0.43. Tried, not faster: bfloat16 arithmetic;
tables of 256 and 65536 entries; reused buffers; filling a slab in smaller pieces. Slabs below 2**19 weights, and copying a
slab's result into y, cost the matmul more than they save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from llmq.core.packing import unpack
from llmq.kernels import dequant
from llmq.kernels.kernel import Kernel
from llmq.kernels.problem import Packed

SLAB = 1 << 20
GPU_SLAB = 1 << 24  # 32 MB in 16 bits


def run(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [M, K] -> y [M, N] in x's dtype."""
    y = _product(x, packed)
    return y if bias is None else y + bias


def _product(x: Tensor, packed: Packed) -> Tensor:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        y: Tensor = torch.ops.llmq.slab_linear(x, packed.weight, packed.scale, packed.zero, *_sizes(packed))
        return y
    return _multiply(x, packed)


def dequantize(packed: Packed, zero: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start .. stop - 1 of the weight, [stop - start, K] in `dtype`. zero: the result of `zero_points`."""
    codes = unpack(packed.weight[start:stop], packed.bits, packed.in_features)
    # Differences of 8-bit codes need 9 bits; differences of narrower codes fit the codes' own bytes.
    wide = codes.to(torch.int16) if packed.bits == 8 else codes.view(torch.int8)
    groups = wide.view(stop - start, -1, packed.group_size)  # [n, G, g]
    groups.sub_(packed.middle if zero is None else zero[start:stop].unsqueeze(-1).to(groups.dtype))
    weight = groups.float().mul_(packed.scale[start:stop].float().unsqueeze(-1))
    return weight.view(stop - start, packed.in_features).to(dtype)


def zero_points(packed: Packed) -> Tensor | None:
    """The zero points as uint8 codes [N, G]; None if symmetric."""
    return None if packed.zero is None else unpack(packed.zero.T, packed.bits, packed.out_features).T.contiguous()


def _slabs(packed: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(output rows, dense weight) of every slab."""
    fused = dequant.takes(packed, dtype)
    zero = None if fused else zero_points(packed)
    step = max(1, (GPU_SLAB if fused else SLAB) // packed.in_features)
    for start in range(0, packed.out_features, step):
        stop = min(start + step, packed.out_features)
        if fused:
            yield slice(start, stop), dequant.dequantize(packed, start, stop, dtype)
        else:
            yield slice(start, stop), dequantize(packed, zero, start, stop, dtype)


def _multiply(x: Tensor, packed: Packed) -> Tensor:
    y = x.new_empty(x.shape[0], packed.out_features)
    for rows, weight in _slabs(packed, x.dtype):
        torch.mm(x, weight.T, out=y[:, rows])
    return y


def multiply_back(grad: Tensor, packed: Packed) -> Tensor:
    """grad [M, N] -> the gradient of x [M, K], summed over slabs in float32."""
    total = grad.new_zeros(grad.shape[0], packed.in_features, dtype=torch.promote_types(grad.dtype, torch.float32))
    for rows, weight in _slabs(packed, grad.dtype):
        total += grad[:, rows] @ weight
    return total.to(grad.dtype)


def gradient(grad: Tensor, parts: Sequence[Packed]) -> Tensor:
    """grad [M, N] -> the gradient of x [M, K] for the weight whose rows are those of `parts`, in order. Differentiable."""
    pieces, gradients = grad.split_with_sizes([part.out_features for part in parts], 1), []
    for piece, packed in zip(pieces, parts, strict=True):
        stored = (packed.weight, packed.scale, packed.zero)
        gradients.append(torch.ops.llmq.slab_linear_back(piece.contiguous(), *stored, *_sizes(packed)))
    total: Tensor = reduce(add, reversed(gradients))  # last part first: the order of autograd for separate linears
    return total


def _sizes(packed: Packed) -> tuple[int, int, int, int]:
    return packed.out_features, packed.in_features, packed.bits, packed.group_size


_ARGUMENTS = "Tensor weight, Tensor scale, Tensor? zero, int out_features, int in_features, int bits, int group_size"


@torch.library.custom_op("llmq::slab_linear", mutates_args=(), schema=f"(Tensor x, {_ARGUMENTS}) -> Tensor")
def _forward(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, *sizes: int) -> Tensor:
    return _multiply(x, _packed(weight, scale, zero, *sizes))


@torch.library.custom_op("llmq::slab_linear_back", mutates_args=(), schema=f"(Tensor grad, {_ARGUMENTS}) -> Tensor")
def _backward(grad: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, *sizes: int) -> Tensor:
    return multiply_back(grad, _packed(weight, scale, zero, *sizes))


def _packed(
    weight: Tensor, scale: Tensor, zero: Tensor | None, out_features: int, in_features: int, bits: int, group_size: int
) -> Packed:
    return Packed(out_features, in_features, bits, group_size, weight, scale, zero)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, out_features: int, *sizes: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@_backward.register_fake
def _(grad: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, n: int, in_features: int, *s: int) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, zero, *ctx.sizes = inputs
    ctx.save_for_backward(weight, scale, zero)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    result = torch.ops.llmq.slab_linear_back(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes)
    return (result, *(None,) * 7)


def _gradients_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    result = torch.ops.llmq.slab_linear(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes)
    return (result, *(None,) * 7)


_forward.register_autograd(_gradients, setup_context=_save_inputs)
_backward.register_autograd(_gradients_back, setup_context=_save_inputs)


KERNEL = Kernel(name="slab", run=run)
