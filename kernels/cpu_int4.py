"""torch's int4 kernel for CPUs: each packed weight is read once per call and never written out. For few rows of x.

The op computes y = x @ ((q - 8) * scale + zero)^T for codes q of 4 bits, with a scale and a *float* zero per group of
32, 64, 128 or 256 columns, in float32, and rounds y once. More fits into that than it says:

    2, 3 bits     codes moved to the middle of 0 .. 15; the layout takes 4 bits for each
    8 bits        the high and the low half of each code are two weights of 4 bits, stacked as 2 N rows, added after:
                  code - z = (16 (high - 8) + 136 - z) + (low - 8)
    groups        any multiple of 32 (or one per channel) is several groups of the op with one scale
    asymmetric    the float zero is (8 - z) * scale, in bfloat16: off by up to 1/64 of a step for a whole group, as
                  much as a dense bfloat16 weight, but not at random. What was rounded off is itself a bfloat16 number
                  exactly, and is added as (sums of x over groups) @ rest.

The gradient of x goes through the stored weight, slab by slab (`llmq.kernels.slab`).

Runtime layout: the op's own of the codes (uint8 [P N, K / 2]; P = 2 at 8 bits, else 1), pairs of scale and zero
[G, P N, 2], and the rest [G, N] where there is one. It stands beside the stored tensors, not in their place: a
checkpoint is loaded as a mapped file, whose pages the system takes back when it needs memory.

Measured on 2 cores of an AVX-512 x86 (EPYC 9004, torch 2.13), weights out of cache, groups of 64, microseconds:

    N x K            M    dense bfloat16    this     slab
    576 x 576        1                64      21      163
    576 x 576       32               119     135      220
    576 x 576       64               181     256      286
    4096 x 4096      1              1593     485     5748
    4096 x 4096     32              3562    6255     8097
    4096 x 4096     48              4700    9333     9099
    4096 x 4096     64              5886   12419    10280

One row is 3.0 to 3.5 times as fast as dense (576 x 576 to 4096 x 4096), asymmetric 1.4 to 2.7 times. The time grows with
every 4 rows, so that `slab` overtakes it at about 48, on large weights first. In float16 and float32 the op has no
vector code and takes 20 to 40 times as long: refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.core.packing import unpack
from llmq.kernels import slab
from llmq.kernels.problem import Packed, Problem

NAME = "cpu_int4"
JOINS = True
GROUPS = (256, 128, 64, 32)
MOST_ROWS = 48


@dataclass(frozen=True)
class Runtime:
    """The op's weight [P N, K / 2], scales and zeros [G, P N, 2], the zeros' rest [G, N] or None; N; what it was made of."""

    weight: Tensor
    pairs: Tensor
    rest: Tensor | None
    group_size: int
    rows: int
    stored: tuple[Packed, ...]


def refusal(problem: Problem) -> str | None:
    """Why this kernel does not take a problem; None where it does."""
    if problem.streamed:
        return "keeps a layout of its own in memory, and the weight is offloaded"
    if problem.device != "cpu":
        return f"runs on the CPU; the weight is on {problem.device}"
    if vector_code() not in ("AVX2", "AVX512"):
        return f"has vector code for AVX2 and AVX512 only; torch runs {vector_code()} on this CPU"
    for what, dtype in (("input", problem.dtype), ("scales", problem.scale_dtype)):
        if dtype != torch.bfloat16:
            return f"is fast and exact for bfloat16 only; {what}: {str(dtype).removeprefix('torch.')}"
    if problem.group_size % GROUPS[-1]:
        return f"takes groups that 32 divides; these have {problem.group_size} columns"
    if problem.rows % 16:
        return f"takes out_features that 16 divides; there are {problem.rows}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def vector_code() -> str:
    """The instruction set that torch's kernels use on this CPU."""
    return torch.backends.cpu.get_cpu_capability()


def most_rows(problem: Problem) -> int | None:
    """Up to here it is faster than `slab`."""
    return MOST_ROWS


def launch_of(problem: Problem, rows: int, device: torch.device) -> str | None:
    """There is nothing to choose."""
    return None


def prepare(packed: Packed) -> Runtime:
    """The op's layout of a weight."""
    size = next(size for size in GROUPS if packed.group_size % size == 0)
    codes = unpack(packed.weight, packed.bits, packed.columns)  # [N, K]
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
    rest = None
    if points is not None:
        rest = (zero - rounded.float())[: packed.rows].T.bfloat16().contiguous()  # [G, N]
    pairs = torch.stack((scale.bfloat16(), rounded), -1).transpose(0, 1)  # [G, P N, 2]
    pairs = pairs.repeat_interleave(packed.group_size // size, 0).contiguous()
    return Runtime(weight, pairs, rest, size, packed.rows, packed.parts or (packed,))


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
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, runtime.weight, runtime.group_size, runtime.pairs)
    if y.shape[1] != runtime.rows:
        y = y[:, : runtime.rows] + y[:, runtime.rows :]
    if runtime.rest is not None:
        groups = runtime.rest.shape[0]
        sums = x.view(x.shape[0], groups, x.shape[1] // groups).sum(-1)  # [M, G]
        y = torch.addmm(y, sums, runtime.rest)
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
