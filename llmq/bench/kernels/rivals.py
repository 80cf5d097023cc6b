"""The rivals that our kernels are measured beside: a dense weight (cuBLAS), torch's own int4 kernel, gemlite.

Each gets the same stored weight, so that all compute the same function and pass the same check (`llmq.bench.kernels.truth`),
with a tolerance for their own arithmetic. A rival that is not installed or refuses a problem states why and is listed. To add
one, add an entry to `RIVALS`.

    dense        torch.nn.functional.linear on the dequantized weight: cuBLAS on NVIDIA, hipBLAS on AMD, oneDNN on CPUs
    torch int4   aten::_weight_int4pack_mm, y = x @ ((q - 8) scale + zero)^T with a float zero per group; its sibling on CPUs
    gemlite      GemLiteLinear(bits, ...).pack(codes [N, K] uint8, scales [N, G], zeros: [N, G] or one); tunes itself first

Written from aten's int4mm.cu (codes in bytes, the even column in the high half) and gemlite 0.6.0's `core.py`. Not run on a
GPU yet. Left out: Marlin and Machete (vLLM), which are not distributed as wheels of their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.bench.kernels.truth import pieces
from llmq.core.packing import unpack
from llmq.kernels import slab
from llmq.kernels.kernel import accept
from llmq.kernels.problem import Packed, Problem


@dataclass(frozen=True)
class Rival:
    """A kernel of someone else's."""

    name: str
    """In tables and records."""
    refusal: Callable[[Problem], str | None]
    """The reason why it cannot run a problem, worded to follow its name; None if it can."""
    prepare: Callable[[Packed, torch.dtype], Any]
    """(weight, dtype of x) -> its runtime layout."""
    run: Callable[[Tensor, Any], Tensor]
    """(x, runtime layout) -> y."""


def dense(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, with the same bits as the slab kernel's."""
    parts = [slab.dequantize(part, slab.zero_points(part), 0, part.out_features, dtype) for _, part in pieces(packed)]
    return torch.cat(parts)


def _int4_refusal(problem: Problem) -> str | None:
    if problem.device not in ("cuda", "cpu"):
        return f"requires CUDA or the CPU; the weight is on {problem.device}"
    if problem.dtype != torch.bfloat16:
        return f"requires bfloat16 input; got {str(problem.dtype).removeprefix('torch.')}"
    if problem.bits != 4 or problem.group_size not in (32, 64, 128, 256):
        return f"requires 4 bits in groups of 32, 64, 128 or 256; got {problem.bits} bits in groups of {problem.group_size}"
    if problem.in_features % 128 or problem.out_features % 16:
        sizes = f"{problem.in_features} and {problem.out_features}"
        return f"requires in_features divisible by 128 and out_features divisible by 16; got {sizes}"
    return None


def _int4_prepare(packed: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """The op's layout of the codes, [G, N, 2] of scales and zeros, the group size."""
    codes = unpack(packed.weight, 4, packed.in_features)
    points = slab.zero_points(packed)
    scale = packed.scale.float()
    zero = torch.zeros_like(scale) if points is None else (8 - points.float()) * scale
    pairs = torch.stack((scale, zero), -1).to(dtype).transpose(0, 1).contiguous()
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1), pairs, packed.group_size
    both = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack(both, 8), pairs, packed.group_size


def _int4_run(x: Tensor, runtime: tuple[Tensor, Tensor, int]) -> Tensor:
    weight, pairs, group_size = runtime
    op = torch.ops.aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch.ops.aten._weight_int4pack_mm
    y: Tensor = op(x, weight, group_size, pairs)
    return y


def _gemlite_refusal(problem: Problem) -> str | None:
    if importlib.util.find_spec("gemlite") is None:
        return "is not installed: pip install gemlite"
    return None if problem.device == "cuda" else f"requires a GPU; the weight is on {problem.device}"


def _gemlite_prepare(packed: Packed, dtype: torch.dtype) -> Any:
    from gemlite.core import DType, GemLiteLinear

    x_dtype = DType.FP16 if dtype == torch.float16 else DType.BF16
    sizes = {"in_features": packed.in_features, "out_features": packed.out_features, "group_size": packed.group_size}
    layer = GemLiteLinear(packed.bits, **sizes, input_dtype=x_dtype, output_dtype=x_dtype)
    points = slab.zero_points(packed)
    zeros = packed.middle if points is None else points.to(dtype)
    layer.pack(unpack(packed.weight, packed.bits, packed.in_features), packed.scale.to(dtype), zeros, None)
    return layer


def _gemlite_run(x: Tensor, layer: Any) -> Tensor:
    y: Tensor = layer(x)
    return y


DENSE = Rival("dense", accept, dense, torch.nn.functional.linear)
RIVALS = (
    DENSE,
    Rival("torch int4", _int4_refusal, _int4_prepare, _int4_run),
    Rival("gemlite", _gemlite_refusal, _gemlite_prepare, _gemlite_run),
)
