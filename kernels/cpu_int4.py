"""torch's int4 kernel for CPUs: packed weights stay packed, each read once per call. For few rows of x.

Runtime layout, made once from the checkpoint's: the op's own weight layout (uint8 [N, K / 2]) and scale-and-zero pairs
[G, N, 2] in x's dtype. The op computes (q - 8) * scale + zero with a zero in that dtype; for a symmetric weight it is
exactly 0. An asymmetric one would have (8 - z) * scale rounded to 8 bits of mantissa in bfloat16, an error as large as
that of the quantization itself, so it is left to the slab kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.core.packing import unpack
from llmq.kernels.problem import Packed, Problem

NAME = "cpu_int4"
GROUPS = (32, 64, 128, 256)
MOST_ROWS = 96
"""Rows of x up to which this op beats the slab kernel.

Measured in bfloat16 on 2 cores of an AVX-512 x86, 4096 x 2048 (ms, int4 / slab / dense): 64 rows 6.4 / 8.0 / 3.0,
128 rows 13.2 / 12.1 / 5.5, 512 rows 49.8 / 27.0 / 20.7; 1 row 0.24 / - / 0.62.
"""


@dataclass(frozen=True)
class Runtime:
    weight: Tensor
    scale_and_zero: Tensor
    group_size: int


def refusal(problem: Problem) -> str | None:
    """Why this kernel does not take a problem; None where it does."""
    if problem.device != "cpu":
        return f"runs on the CPU, not on {problem.device}"
    if problem.bits != 4:
        return f"takes 4 bits, not {problem.bits}"
    if not problem.symmetric:
        return "takes symmetric weights: its zero points would be rounded"
    if problem.group_size not in GROUPS:
        return f"takes groups of {', '.join(map(str, GROUPS))}, not {problem.group_size}"
    if problem.rows % 16:
        return f"takes out_features that 16 divides, not {problem.rows}"
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {problem.dtype}"
    return None


def prepare(packed: Packed) -> Runtime:
    """The op's own layout of a weight."""
    problem = packed.problem
    codes = unpack(packed.weight, 4, problem.columns).int()  # [N, K]
    scale = packed.scale.to(problem.dtype)
    pairs = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()  # [G, N, 2]
    return Runtime(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), pairs, problem.group_size)


def run(x: Tensor, runtime: Runtime) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype, accumulated in float32."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), runtime.weight, runtime.group_size, runtime.scale_and_zero
    )
    return product
