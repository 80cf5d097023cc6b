"""The Triton kernel for weights of 4 and 8 bits and few rows of x: checks, launch, operator. Device code: `_wna16_swap`.

Weights are read packed, once for every 64 rows of x (128 on sm_90 and sm_100); sums are float32; y is rounded once.
float16 and bfloat16, symmetric and asymmetric, groups of 32, 64, multiples of 128 or per channel, any N, K and M >= 0.

Triton is imported by the first launch. On the CPU the kernel runs in Triton's interpreter, where TRITON_INTERPRET=1 was
set before triton was imported: for tests, a thousand times slower than anything else.

Counters of split K: `llmq.kernels.counters`. Partial sums under a CUDA graph are the graph's own memory.

Under autograd and torch.compile a call is one operator, `llmq::wna16_linear`; the gradient of x goes through the dequantized
weight, slab by slab (`llmq.kernels.slab`). Left out: a gradient of the weight.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.kernels import counters, layout, slab
from llmq.kernels.launch import Device, Launch, compiler_options, configure, table_of, told
from llmq.kernels.layout import Tiled
from llmq.kernels.problem import Packed, Problem

NAME = "triton"
JOINS = True
MOST_ROWS = 256
OLDEST = (8, 0)
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Within a block offsets are of 32 bits, between blocks of 64: 128 rows of x lie within 2**31 elements.
FARTHEST_ROW = 1 << 24


def refusal(problem: Problem) -> str | None:
    """Why this kernel does not take a problem; None where it does."""
    if not _installed():
        return "needs the package triton, which is not installed: pip install triton"
    if problem.device not in ("cuda", "cpu"):
        return f"runs on CUDA and ROCm devices; the weight is on {problem.device}"
    if problem.device == "cpu" and not interpreting():
        return (
            "runs on GPUs; the weight is on cpu, and Triton's interpreter is off (TRITON_INTERPRET=1 at the start: on)"
        )
    if problem.device == "cuda" and torch.version.hip is None:
        oldest = _oldest()
        if oldest is None:
            return "runs on GPUs; torch finds none here"
        if oldest < OLDEST:
            return f"needs sm_80 or newer; the oldest GPU here is sm_{oldest[0]}{oldest[1]}"
    if problem.streamed:
        return "keeps a layout of its own in memory, and the weight is offloaded"
    if problem.dtype not in DTYPES:
        return f"takes float16 and bfloat16; input: {str(problem.dtype).removeprefix('torch.')}"
    return layout.refusal(problem.columns, problem.group_size, problem.bits, problem.scale_dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interpreting() -> bool:
    """Whether triton interprets: it reads the variable when it is imported, and again for each kernel."""
    loaded = sys.modules.get("triton.language.standard")
    on = loaded is None or not isinstance(loaded.sum, sys.modules["triton"].JITFunction)
    return on and os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _oldest() -> tuple[int, int] | None:
    return min((torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())), default=None)


def most_rows(problem: Problem) -> int | None:
    """Beyond it a dense matmul of dequantized slabs wins. By counting, until a GPU has measured it."""
    return MOST_ROWS


def launch_of(problem: Problem, rows: int, device: torch.device) -> str | None:
    """The configuration, and whether it was measured or follows the rules."""
    if rows < 1:
        return None
    found = device_of(device)
    group = 0 if problem.group_size == problem.columns else problem.group_size
    sizes = (group, rows, problem.rows, problem.columns)
    return told(found, DTYPES[problem.dtype], *sizes, table_of(found), problem.bits)


def prepare(packed: Packed) -> Tiled:
    """The tiled layout, on the weight's device. `LlmqError` where a scale is not finite."""
    if not bool(torch.isfinite(packed.scale).all()):
        row, group = (int(i) for i in (~torch.isfinite(packed.scale)).nonzero()[0])
        raise LlmqError(f"scales must be finite; that of row {row}, group {group} is {packed.scale[row, group].item()}")
    tiled = layout.tile(packed)
    if packed.weight.device.type == "cuda":
        counters.reserve(packed.weight.device)
    return tiled


def run(x: Tensor, tiled: Tiled, bias: Tensor | None = None) -> Tensor:
    """x [M, K], float16 or bfloat16 -> x @ W^T + bias [M, N] in x's dtype."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        sizes = (tiled.rows, tiled.columns, tiled.bits, tiled.group_size)
        y: Tensor = torch.ops.llmq.wna16_linear(x, tiled.words, tiled.scales, tiled.zeros, bias, *sizes)
        return y
    return multiply(x, tiled, bias)


def multiply(x: Tensor, tiled: Tiled, bias: Tensor | None = None, launch: Launch | None = None) -> Tensor:
    """As `run`, without autograd. launch: the configuration, in the place of the one that `llmq.kernels.launch` gives."""
    check(x, tiled, bias)
    rows = x.shape[0]
    y = x.new_empty(rows, tiled.rows)
    if rows == 0 or tiled.rows == 0:
        return y
    launch = launch or configuration(tiled, rows, x.dtype, x.device)
    if tiled.words.shape[0] % (launch.bn // 64):
        raise LlmqError(f"bn must divide the padded rows {64 * tiled.words.shape[0]}; got {launch.bn}: use 64")
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            _launch(_aligned(x), tiled, bias, y, launch)
    else:
        _launch(_aligned(x), tiled, bias, y, launch)
    return y


def check(x: Tensor, tiled: Tiled, bias: Tensor | None) -> None:
    """Raise `LlmqError` for anything that a launch could read or write out of bounds, or misread."""
    if x.ndim != 2 or x.shape[1] != tiled.columns:
        raise LlmqError(f"x must be [M, {tiled.columns}]; got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise LlmqError(f"x must be float16 or bfloat16; got {x.dtype}: cast it")
    reason = layout.refusal(tiled.columns, tiled.group_size, tiled.bits, tiled.scales.dtype)
    if reason:
        raise LlmqError(f"the kernel {reason}")
    words = (-(-tiled.rows // layout.TILE_ROWS), -(-tiled.columns // layout.TILE_COLUMNS), 16 * tiled.bits, 16)
    _check_stored("words", tiled.words, torch.int32, words)
    pairs = (layout.groups_of(tiled.columns, tiled.group_size), words[0] * layout.TILE_ROWS)
    _check_stored("scales", tiled.scales, tiled.scales.dtype, pairs)
    if tiled.columns >= FARTHEST_ROW or tiled.scales.numel() >= 1 << 31:
        raise LlmqError(f"the kernel takes fewer than {FARTHEST_ROW} columns and 2**31 scales; got {tiled.columns}")
    if tiled.zeros is not None:
        _check_stored("zeros", tiled.zeros, torch.int16, pairs)
    if bias is not None:
        _check_stored("bias", bias, x.dtype, (tiled.rows,))
    for name, tensor in (("words", tiled.words), ("scales", tiled.scales), ("zeros", tiled.zeros), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise LlmqError(f"all tensors must be on one device; x is on {x.device}, {name} on {tensor.device}")


def _check_stored(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)}" + ("" if tensor.is_contiguous() else ", not contiguous")
        raise LlmqError(f"{name} must be contiguous {dtype} {list(shape)}; got {found}")


def configuration(tiled: Tiled, rows: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The configuration that M = `rows` is launched with."""
    return _configured(device, dtype, tiled.bits, _group(tiled), rows, tiled.rows, tiled.columns)


@cache  # at most MOST_ROWS for each shape: a look-up in the place of a search through the table in every call
def _configured(device: torch.device, dtype: torch.dtype, bits: int, group: int, rows: int, n: int, k: int) -> Launch:
    found = device_of(device)
    return configure(found, DTYPES[dtype], group, rows, n, k, table_of(found), bits)


def _group(tiled: Tiled) -> int:
    return 0 if tiled.group_size == tiled.columns else tiled.group_size


@cache  # every launch asks
def device_of(device: torch.device) -> Device:
    """What configurations depend on; `interpreter` with 8 processors for the CPU."""
    if device.type == "cpu":
        return Device("interpreter", 8)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device(found.gcnArchName.split(":")[0], found.multi_processor_count, found.name)
    return Device(f"sm_{found.major}{found.minor}", found.multi_processor_count, found.name)


def _aligned(x: Tensor) -> Tensor:
    """x with a last dimension without gaps and divisible by 16, rows as far apart, and a first byte at 16: else a copy."""
    columns = x.shape[1]
    stride = x.stride(0) if x.shape[0] > 1 else 16
    near = 0 <= stride < FARTHEST_ROW
    if near and columns % 16 == 0 and x.stride(1) == 1 and stride % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -columns % 16)).clone(memory_format=torch.contiguous_format)


def _launch(x: Tensor, tiled: Tiled, bias: Tensor | None, y: Tensor, launch: Launch) -> None:
    import triton.language as tl

    from llmq.kernels._wna16_swap import wna16_swap

    row_tiles, tiles = tiled.words.shape[:2]
    grid = (row_tiles * 64 // launch.bn, -(-x.shape[0] // launch.bm), launch.split)
    partials, counted = y, tiled.words  # not read
    if launch.split > 1:
        partials = torch.empty(grid[0] * grid[1] * launch.split * launch.bn * launch.bm, device=x.device)
        counted = counters.zeros(x.device, grid[0] * grid[1])
    scales = tiled.scales.view(torch.int32)
    zeros = scales if tiled.zeros is None else tiled.zeros.view(torch.int32)
    wna16_swap[grid](
        x, tiled.words, scales, zeros, y if bias is None else bias, y, partials, counted,
        x.shape[0], tiled.rows, x.shape[1], x.stride(0) if x.shape[0] > 1 else x.shape[1], tiles,
        BM=launch.bm, BN=launch.bn, STAGES=launch.stages, SPLIT=launch.split, BITS=tiled.bits,
        GROUP=_group(tiled), SYMMETRIC=tiled.zeros is None, BIAS=bias is not None, RAGGED=x.shape[1] % layout.TILE_COLUMNS != 0,
        SCALE=tl.float16 if tiled.scales.dtype == torch.float16 else tl.bfloat16, FORM=launch.form,
        **compiler_options(device_of(x.device).arch, launch),
    )  # fmt: skip


_ARGUMENTS = "Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, int rows, int columns, int bits, int group_size"


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
def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias: Any, rows: int, *sizes: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@_backward.register_fake
def _(
    grad: Tensor, words: Tensor, scales: Tensor, zeros: Any, bias: Any, rows: int, columns: int, *sizes: int
) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
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


_forward.register_autograd(_gradients, setup_context=_remember)
_backward.register_autograd(_gradients_back, setup_context=_remember)
