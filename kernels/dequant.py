"""Dense rows of a packed weight by a Triton kernel (`_wna16_dequant`), for the slab kernel on GPUs: one pass, not torch's many.

The result has the same bits as `llmq.kernels.slab.dequantize` on the CPU. On the CPU the Triton kernel runs in Triton's
interpreter only, for tests.
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
MIN_CAPABILITY = (8, 0)


def takes(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether `dequantize` can run a weight where it is: on a GPU with triton, supported bits and dtypes, contiguous tensors."""
    supported = packed.bits in BITS and dtype in DTYPES and packed.scale.dtype in DTYPES
    tensors = (packed.weight, packed.scale, packed.zero)
    contiguous = all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return supported and contiguous and packed.weight.device.type == "cuda" and _ready()


@cache
def _ready() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return torch.version.hip is not None or (bool(capabilities) and min(capabilities) >= MIN_CAPABILITY)


def dequantize(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start .. stop - 1 of the weight, [stop - start, K] in `dtype` (float16, bfloat16, float32).

    Raises `LlmqError` for tensors that the kernel would read out of bounds or misinterpret.
    """
    _check_arguments(packed, start, stop, dtype)
    out = packed.weight.new_empty(stop - start, packed.in_features, dtype=dtype)
    if out.numel():
        if out.device.type == "cuda":
            with torch.cuda.device(out.device):
                _launch(packed, start, out)
        else:
            _launch(packed, start, out)
    return out


def _check_arguments(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> None:
    n, k, bits = packed.out_features, packed.in_features, packed.bits
    if bits not in BITS or dtype not in DTYPES or packed.scale.dtype not in DTYPES:
        raise LlmqError(
            f"bits must be one of {BITS}, dtypes float16, bfloat16 or float32; got {bits}, {packed.scale.dtype}, {dtype}"
        )
    if not 0 <= start <= stop <= n:
        raise LlmqError(f"rows must be within 0 .. {n}; got {start} .. {stop}")
    if packed.group_size < 1 or k % packed.group_size:
        raise LlmqError(f"group_size must divide in_features {k}; got {packed.group_size}")
    groups = k // packed.group_size
    expected = [("weight", packed.weight, torch.int32, (n, -(-k * bits // 32)))]
    expected.append(("scale", packed.scale, packed.scale.dtype, (n, groups)))
    if packed.zero is not None:
        expected.append(("zero", packed.zero, torch.int32, (-(-n * bits // 32), groups)))
    for name, tensor, expected_dtype, shape in expected:
        if tensor.dtype != expected_dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise LlmqError(
                f"{name} must be contiguous {expected_dtype} {list(shape)}; got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != packed.weight.device:
            raise LlmqError(f"all tensors must be on one device; got {packed.weight.device} and {tensor.device}")


def _launch(packed: Packed, start: int, out: Tensor) -> None:
    from llmq.kernels._wna16_dequant import ROWS, WARPS, wna16_dequant

    n, k = out.shape
    groups = k // packed.group_size
    stop = start + n
    wna16_dequant[-(-n // ROWS), -(-k // 512)](
        packed.weight[start:stop], packed.scale[start:stop],
        packed.weight if packed.zero is None else packed.zero, out,
        start, n, k, packed.weight.shape[1], groups,
        BN=ROWS, BITS=packed.bits, GROUP=0 if groups == 1 else packed.group_size, SYMMETRIC=packed.zero is None,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
