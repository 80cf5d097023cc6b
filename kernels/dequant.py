"""Dense rows of a packed weight by Triton, for the slab path on GPUs: one pass, not torch's many. See `_wna16_dequant`.

The same bits as `llmq.kernels.slab.dequantize` gives on the CPU. On the CPU it runs in Triton's interpreter alone, for tests.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.kernels.problem import Packed

BITS = (2, 3, 4, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)


def takes(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether the kernel is the way to dequantize a weight where it lies: on a GPU, with triton, of these types, in one piece."""
    known = packed.bits in BITS and dtype in DTYPES and packed.scale.dtype in DTYPES
    parts = (packed.weight, packed.scale, packed.zero)
    whole = all(part is None or part.is_contiguous() for part in parts)
    return known and whole and packed.weight.device.type == "cuda" and _ready()


@cache
def _ready() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return torch.version.hip is not None or (bool(found) and min(found) >= OLDEST)


def dequantize(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start .. stop - 1 of the weight, [stop - start, K] in `dtype` (float16, bfloat16, float32).

    `LlmqError` for tensors that the kernel would read out of bounds, or misread.
    """
    _check(packed, start, stop, dtype)
    out = packed.weight.new_empty(stop - start, packed.columns, dtype=dtype)
    if out.numel():
        if out.device.type == "cuda":
            with torch.cuda.device(out.device):
                _launch(packed, start, out)
        else:
            _launch(packed, start, out)
    return out


def _check(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> None:
    rows, columns, bits = packed.rows, packed.columns, packed.bits
    if bits not in BITS or dtype not in DTYPES or packed.scale.dtype not in DTYPES:
        raise LlmqError(
            f"bits must be of {BITS}, dtypes float16, bfloat16 or float32; got {bits}, {packed.scale.dtype}, {dtype}"
        )
    if not 0 <= start <= stop <= rows:
        raise LlmqError(f"rows must lie in 0 .. {rows}; got {start} .. {stop}")
    if packed.group_size < 1 or columns % packed.group_size:
        raise LlmqError(f"group_size must divide the {columns} columns; got {packed.group_size}")
    groups = columns // packed.group_size
    wanted = [("weight", packed.weight, torch.int32, (rows, -(-columns * bits // 32)))]
    wanted.append(("scale", packed.scale, packed.scale.dtype, (rows, groups)))
    if packed.zero is not None:
        wanted.append(("zero", packed.zero, torch.int32, (-(-rows * bits // 32), groups)))
    for name, tensor, kind, shape in wanted:
        if tensor.dtype != kind or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise LlmqError(f"{name} must be contiguous {kind} {list(shape)}; got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != packed.weight.device:
            raise LlmqError(f"all tensors must be on one device; got {packed.weight.device} and {tensor.device}")


def _launch(packed: Packed, start: int, out: Tensor) -> None:
    from llmq.kernels._wna16_dequant import ROWS, WARPS, wna16_dequant

    rows, columns = out.shape
    groups = columns // packed.group_size
    stop = start + rows
    wna16_dequant[-(-rows // ROWS), -(-columns // 512)](
        packed.weight[start:stop], packed.scale[start:stop],
        packed.weight if packed.zero is None else packed.zero, out,
        start, rows, columns, packed.weight.shape[1], groups,
        BN=ROWS, BITS=packed.bits, GROUP=0 if groups == 1 else packed.group_size, SYMMETRIC=packed.zero is None,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
