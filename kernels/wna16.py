"""The Triton kernel for 4- and 8-bit weights and few rows of x: checks, launch, operator. Device code: `_wna16_swap`.

Weights are read packed, once for every 64 rows of x (128 on sm_90 and sm_100). Sums are float32; y is rounded once. float16
and bfloat16, symmetric and asymmetric, groups of 32, 64, multiples of 128 or per channel, any N, K and M >= 0.

The first launch imports Triton. On the CPU the kernel runs in Triton's interpreter, if TRITON_INTERPRET=1 was set before
triton was imported: for tests only, a thousand times slower than any other kernel.

`llmq.kernels.counters` has the counters of split K. Under a CUDA graph the partial sums belong to the graph's memory.

Under autograd and torch.compile a call is one operator, `llmq::wna16_linear`. The gradient of x goes through the dequantized
weight, slab by slab (`llmq.kernels.slab`). Left out: a gradient of the weight.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.kernels import counters, layout, slab
from llmq.kernels.kernel import Kernel
from llmq.kernels.launch import Device, Launch, compiler_options, configure, describe, table_of
from llmq.kernels.layout import Tiled
from llmq.kernels.problem import Packed, Problem

MAX_ROWS = 256
MIN_CAPABILITY = (8, 0)
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Offsets have 32 bits within a block and 64 bits between blocks: 128 rows of x must lie within 2**31 elements.
MAX_STRIDE = 1 << 24

Launcher = Callable[[Tensor, Tiled, Tensor | None, Tensor, Launch], object]
"""(aligned x, weight, bias, y to fill, configuration): starts the kernel."""


def refusal(problem: Problem) -> str | None:
    """The reason why this kernel cannot run a problem; None if it can."""
    if not _installed():
        return "requires the package triton, which is not installed: pip install triton"
    if problem.device not in ("cuda", "cpu"):
        return f"requires a CUDA or ROCm device; the weight is on {problem.device}"
    if problem.device == "cpu" and not interpreting():
        return "requires a GPU; the weight is on cpu (set TRITON_INTERPRET=1 before importing triton to use its interpreter)"
    if problem.device == "cuda" and torch.version.hip is None:
        capability = _min_capability()
        if capability is None:
            return "requires a GPU; torch finds none"
        if capability < MIN_CAPABILITY:
            return f"requires sm_80 or newer; the oldest GPU here is sm_{capability[0]}{capability[1]}"
    if problem.offloaded:
        return "keeps its own layout in memory, but the weight is offloaded"
    if problem.dtype not in DTYPES:
        return f"requires float16 or bfloat16 input; got {str(problem.dtype).removeprefix('torch.')}"
    return layout.refusal(problem.in_features, problem.group_size, problem.bits, problem.scale_dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interpreting() -> bool:
    """Whether Triton interprets. It reads the variable when it is imported, and again for each kernel."""
    loaded = sys.modules.get("triton.language.standard")
    on = loaded is None or not isinstance(loaded.sum, sys.modules["triton"].JITFunction)
    return on and os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _min_capability() -> tuple[int, int] | None:
    return min((torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())), default=None)


def max_rows(problem: Problem) -> int | None:
    """Above this M a dense matmul of dequantized slabs is faster: by counting, not measured on a GPU yet."""
    return MAX_ROWS


def describe_launch(problem: Problem, rows: int, device: torch.device) -> str | None:
    """The configuration, and whether it was measured or follows the rules; None for no rows."""
    if rows < 1:
        return None
    known = device_of(device)
    group = 0 if problem.group_size == problem.in_features else problem.group_size
    sizes = (group, rows, problem.out_features, problem.in_features)
    return describe(known, DTYPES[problem.dtype], *sizes, table_of(known), problem.bits)


def prepare(packed: Packed) -> Tiled:
    """Make the tiled layout, on the weight's device. Raises `LlmqError` if a scale is not finite."""
    if not bool(torch.isfinite(packed.scale).all()):
        row, group = (int(i) for i in (~torch.isfinite(packed.scale)).nonzero()[0])
        raise LlmqError(f"scales must be finite; row {row}, group {group} has {packed.scale[row, group].item()}")
    tiled = layout.tile(packed)
    if packed.weight.device.type == "cuda":
        counters.reserve(packed.weight.device)
    return tiled


def run(x: Tensor, tiled: Tiled, bias: Tensor | None = None) -> Tensor:
    """x [M, K], float16 or bfloat16 -> x @ W^T + bias [M, N] in x's dtype."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        sizes = (tiled.out_features, tiled.in_features, tiled.bits, tiled.group_size)
        y: Tensor = torch.ops.llmq.wna16_linear(x, tiled.words, tiled.scales, tiled.zeros, bias, *sizes)
        return y
    return multiply(x, tiled, bias)


def multiply(
    x: Tensor,
    tiled: Tiled,
    bias: Tensor | None = None,
    launch: Launch | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """`run` without autograd.

    launch: the configuration; by default that of `llmq.kernels.launch`. launcher: starts the kernel, for measuring the
    host code without it; by default Triton does.
    """
    check_arguments(x, tiled, bias)
    rows = x.shape[0]
    y = x.new_empty(rows, tiled.out_features)
    if rows == 0 or tiled.out_features == 0:
        return y
    launch = launch or configuration(tiled, rows, x.dtype, x.device)
    launcher = launcher or _launch
    if tiled.words.shape[0] % (launch.bn // 64):
        raise LlmqError(f"bn must divide the padded out_features {64 * tiled.words.shape[0]}; got {launch.bn}; use 64")
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            launcher(_aligned(x), tiled, bias, y, launch)
    else:
        launcher(_aligned(x), tiled, bias, y, launch)
    return y


def check_arguments(x: Tensor, tiled: Tiled, bias: Tensor | None) -> None:
    """Raise `LlmqError` for anything that would make a launch access memory out of bounds or misinterpret it."""
    if x.ndim != 2 or x.shape[1] != tiled.in_features:
        raise LlmqError(f"x must be [M, {tiled.in_features}]; got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise LlmqError(f"x must be float16 or bfloat16; got {x.dtype}; cast it")
    reason = layout.refusal(tiled.in_features, tiled.group_size, tiled.bits, tiled.scales.dtype)
    if reason:
        raise LlmqError(f"the kernel {reason}")
    words = (-(-tiled.out_features // layout.TILE_N), -(-tiled.in_features // layout.TILE_K), 16 * tiled.bits, 16)
    _check_stored("words", tiled.words, torch.int32, words)
    pairs = (layout.groups_of(tiled.in_features, tiled.group_size), words[0] * layout.TILE_N)
    _check_stored("scales", tiled.scales, tiled.scales.dtype, pairs)
    if tiled.in_features >= MAX_STRIDE or tiled.scales.numel() >= 1 << 31:
        actual = f"{tiled.in_features} and {tiled.scales.numel()}"
        raise LlmqError(f"in_features must be below {MAX_STRIDE} and scales below 2**31; got {actual}")
    if tiled.zeros is not None:
        _check_stored("zeros", tiled.zeros, torch.int16, pairs)
    if bias is not None:
        _check_stored("bias", bias, x.dtype, (tiled.out_features,))
    for name, tensor in (("words", tiled.words), ("scales", tiled.scales), ("zeros", tiled.zeros), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise LlmqError(f"all tensors must be on one device; x is on {x.device}, {name} on {tensor.device}")


def _check_stored(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        actual = f"{tensor.dtype} {list(tensor.shape)}" + ("" if tensor.is_contiguous() else ", not contiguous")
        raise LlmqError(f"{name} must be contiguous {dtype} {list(shape)}; got {actual}")


def configuration(tiled: Tiled, rows: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch configuration for M = `rows`."""
    return _configured(device, dtype, tiled.bits, _group(tiled), rows, tiled.out_features, tiled.in_features)


@cache  # at most MAX_ROWS entries per shape; avoids a search through the table in every call
def _configured(device: torch.device, dtype: torch.dtype, bits: int, group: int, rows: int, n: int, k: int) -> Launch:
    known = device_of(device)
    return configure(known, DTYPES[dtype], group, rows, n, k, table_of(known), bits)


def _group(tiled: Tiled) -> int:
    return 0 if tiled.group_size == tiled.in_features else tiled.group_size


@cache  # called for every launch
def device_of(device: torch.device) -> Device:
    """The device properties that decide configurations; `interpreter` with 8 processors for the CPU."""
    if device.type == "cpu":
        return Device("interpreter", 8)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count, properties.name)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, properties.name)


def _aligned(x: Tensor) -> Tensor:
    """x itself, or a copy, with K, the row stride and the address divisible by 16 and no gaps within a row."""
    k = x.shape[1]
    stride = x.stride(0) if x.shape[0] > 1 else 16
    near = 0 <= stride < MAX_STRIDE
    if near and k % 16 == 0 and x.stride(1) == 1 and stride % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -k % 16)).clone(memory_format=torch.contiguous_format)


def _launch(x: Tensor, tiled: Tiled, bias: Tensor | None, y: Tensor, launch: Launch) -> None:
    import triton.language as tl

    from llmq.kernels._wna16_swap import wna16_swap

    row_tiles, tiles = tiled.words.shape[:2]
    grid = (row_tiles * 64 // launch.bn, -(-x.shape[0] // launch.bm), launch.split)
    partials, arrived = y, tiled.words  # placeholders, not read without a split
    if launch.split > 1:
        count = grid[0] * grid[1] * launch.split * launch.bn * launch.bm
        partials = torch.empty(count, dtype=torch.float32, device=x.device)
        arrived = counters.zeros(x.device, grid[0] * grid[1])
    scales = tiled.scales.view(torch.int32)
    zeros = scales if tiled.zeros is None else tiled.zeros.view(torch.int32)
    wna16_swap[grid](
        x, tiled.words, scales, zeros, y if bias is None else bias, y, partials, arrived,
        x.shape[0], tiled.out_features, x.shape[1], x.stride(0) if x.shape[0] > 1 else x.shape[1], tiles,
        BM=launch.bm, BN=launch.bn, STAGES=launch.stages, SPLIT=launch.split, BITS=tiled.bits,
        GROUP=_group(tiled), SYMMETRIC=tiled.zeros is None, BIAS=bias is not None, RAGGED=x.shape[1] % layout.TILE_K != 0,
        SCALE=tl.float16 if tiled.scales.dtype == torch.float16 else tl.bfloat16, FORM=launch.form,
        **compiler_options(device_of(x.device).arch, launch),
    )  # fmt: skip


_ARGUMENTS = (
    "Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int out_features, int in_features, int bits, int group_size"
)


@torch.library.custom_op("llmq::wna16_linear", mutates_args=(), schema=f"(Tensor x, {_ARGUMENTS}) -> Tensor")
def _forward(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *sizes: int
) -> Tensor:
    return multiply(x, Tiled(words, scales, zeros, *sizes), bias)


@torch.library.custom_op("llmq::wna16_linear_back", mutates_args=(), schema=f"(Tensor grad, {_ARGUMENTS}) -> Tensor")
def _backward(
    grad: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *sizes: int
) -> Tensor:
    return slab.multiply_back(grad, layout.untile(Tiled(words, scales, zeros, *sizes)))


@_forward.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias: Any, out_features: int, *sizes: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@_backward.register_fake
def _(
    grad: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias: Any, n: int, in_features: int, *sizes: int
) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, scales, zeros, bias, *ctx.sizes = inputs
    ctx.save_for_backward(words, scales, zeros)
    ctx.bias = bias is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x = torch.ops.llmq.wna16_linear_back(grad.contiguous(), *ctx.saved_tensors, None, *ctx.sizes)
    bias = grad.sum(0) if ctx.bias and ctx.needs_input_grad[4] else None
    return (x, None, None, None, bias, None, None, None, None)


def _gradients_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x = torch.ops.llmq.wna16_linear(grad.contiguous(), *ctx.saved_tensors, None, *ctx.sizes)
    return (x, *(None,) * 8)


_forward.register_autograd(_gradients, setup_context=_save_inputs)
_backward.register_autograd(_gradients_back, setup_context=_save_inputs)


KERNEL = Kernel(
    name="triton",
    run=run,
    prepare=prepare,
    refusal=refusal,
    max_rows=max_rows,
    describe_launch=describe_launch,
    supports_fusion=True,
)
