"""torch's int4 kernel for CPUs, for few rows of x. A call reads each packed weight once and writes no dense weight.

The op computes y = x @ ((q - 8) * scale + zero)^T for 4-bit codes q, with one scale and one *float* zero per group of 32,
64, 128 or 256 columns. It computes in float32 and rounds y once. This file maps more cases onto it:

    2, 3 bits     codes are shifted to the middle of 0 .. 15; each takes 4 bits in the layout
    8 bits        the high and low halves of each code are two 4-bit weights, stacked as 2 N rows and added afterwards:
                  code - z = (16 (high - 8) + 136 - z) + (low - 8)
    groups        a multiple of 32, or one group per channel, becomes several groups of the op with equal scales
    asymmetric    the float zero is (8 - z) * scale. bfloat16 rounds it by up to 1/64 of a step. That is as much as a dense
                  bfloat16 weight is rounded, but the error is constant over a group instead of random. The rounded-off
                  part is exactly a bfloat16 number; it is added as (sums of x over groups) @ remainder.

The gradient of x goes through the stored weight, slab by slab (`llmq.kernels.slab`).

The runtime layout (`Runtime`) is kept beside the stored tensors and does not replace them: a checkpoint is a memory-mapped
file, whose pages the system reclaims when it needs memory.

Measured on 2 cores of an AVX-512 x86 (EPYC 9004, torch 2.13), weights out of cache, groups of 64, microseconds:

    N x K            M    dense bfloat16    this     slab
    576 x 576        1                64      21      163
    576 x 576       32               119     135      220
    576 x 576       64               181     256      286
    4096 x 4096      1              1593     485     5748
    4096 x 4096     32              3562    6255     8097
    4096 x 4096     48              4700    9333     9099
    4096 x 4096     64              5886   12419    10280

With one row it is 3.0 to 3.5 times as fast as dense (576 x 576 to 4096 x 4096); asymmetric 1.4 to 2.7 times. The time grows
with every 4 rows; `slab` is faster from about 48 rows on, on large weights first. For float16 and float32 the op has no
vector code and takes 20 to 40 times as long, so those are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.core.packing import unpack
from llmq.kernels import slab
from llmq.kernels.kernel import Kernel
from llmq.kernels.problem import Packed, Problem

GROUPS = (256, 128, 64, 32)
MAX_ROWS = 48


@dataclass(frozen=True)
class Runtime:
    """The op's layout of a weight [N, K]. P = 2 for 8 bits, else 1; G: groups of a row."""

    weight: Tensor
    """uint8 [P N, K / 2]: the op's own order of the codes."""
    scale_and_zero: Tensor
    """bfloat16 [G, P N, 2]."""
    zero_remainder: Tensor | None
    """bfloat16 [G, N]: the part of the float zeros that bfloat16 rounded off; None if symmetric."""
    group_size: int
    """Columns per group of the op; it divides the weight's group size."""
    out_features: int
    """N."""
    stored: tuple[Packed, ...]
    """The stored weights that the layout was made from, for the gradient."""


def refusal(problem: Problem) -> str | None:
    """The reason why the op cannot run a problem; None if it can."""
    if problem.offloaded:
        return "keeps its own layout in memory, but the weight is offloaded"
    if problem.device != "cpu":
        return f"requires the CPU; the weight is on {problem.device}"
    if vector_code() not in ("AVX2", "AVX512"):
        return f"requires AVX2 or AVX512; torch uses {vector_code()} on this CPU"
    for what, dtype in (("input", problem.dtype), ("scales", problem.scale_dtype)):
        if dtype != torch.bfloat16:
            return f"requires bfloat16 {what}; got {str(dtype).removeprefix('torch.')}"
    if problem.group_size % GROUPS[-1]:
        return f"requires group_size divisible by 32; got {problem.group_size}"
    if problem.out_features % 16:
        return f"requires out_features divisible by 16; got {problem.out_features}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def vector_code() -> str:
    """The instruction set that torch's kernels use on this CPU."""
    return torch.backends.cpu.get_cpu_capability()


def max_rows(problem: Problem) -> int | None:
    """Up to this M the op is faster than `slab`."""
    return MAX_ROWS


def prepare(packed: Packed) -> Runtime:
    """Make the op's layout of a weight."""
    size = next(size for size in GROUPS if packed.group_size % size == 0)
    codes = unpack(packed.weight, packed.bits, packed.in_features)  # [N, K]
    scale = packed.scale.float()  # [N, G]
    points = slab.zero_points(packed)
    shift = packed.middle - (packed.middle if points is None else points.float())
    zero = shift * scale if isinstance(shift, Tensor) else torch.zeros_like(scale)
    if packed.bits == 8:
        codes = torch.cat((codes >> 4, codes & 15))
        zero = torch.cat((zero + 8 * scale, torch.zeros_like(zero)))
        scale = torch.cat((16 * scale, scale))
    else:
        codes = codes + (8 - packed.middle)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    rounded = zero.bfloat16()
    remainder = None
    if points is not None:
        remainder = (zero - rounded.float())[: packed.out_features].T.bfloat16().contiguous()  # [G, N]
    scale_and_zero = torch.stack((scale.bfloat16(), rounded), -1).transpose(0, 1)  # [G, P N, 2]
    scale_and_zero = scale_and_zero.repeat_interleave(packed.group_size // size, 0).contiguous()
    return Runtime(weight, scale_and_zero, remainder, size, packed.out_features, packed.parts or (packed,))


def run(x: Tensor, runtime: Runtime, bias: Tensor | None = None) -> Tensor:
    """x [M, K] -> y [M, N], both bfloat16."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        y = _multiply(x, runtime)
    elif torch.compiler.is_compiling():
        y = torch.cat([slab.run(x, part) for part in runtime.stored], 1)
    else:
        y = _Differentiable.apply(x, runtime)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


def _multiply(x: Tensor, runtime: Runtime) -> Tensor:
    x = x.contiguous()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, runtime.weight, runtime.group_size, runtime.scale_and_zero
    )
    if y.shape[1] != runtime.out_features:
        y = y[:, : runtime.out_features] + y[:, runtime.out_features :]
    if runtime.zero_remainder is not None:
        groups = runtime.zero_remainder.shape[0]
        sums = x.view(x.shape[0], groups, x.shape[1] // groups).sum(-1)  # [M, G]
        y = torch.addmm(y, sums, runtime.zero_remainder)
    return y


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, runtime: Runtime) -> Tensor:
        return _multiply(x, runtime)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Runtime], output: Tensor) -> None:
        ctx.stored = inputs[1].stored

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return slab.gradient(grad, ctx.stored), None


KERNEL = Kernel(
    name="cpu_int4",
    run=run,
    prepare=prepare,
    refusal=refusal,
    max_rows=max_rows,
    supports_fusion=True,
)
