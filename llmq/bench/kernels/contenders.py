"""What the kernel benchmark measures: the shapes, its settings, and the contenders (our kernels and their rivals)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.bench.kernels import rivals
from llmq.bench.kernels.timing import Effort
from llmq.errors import LlmqError
from llmq.kernels import reference, wna16
from llmq.kernels.kernel import Kernel
from llmq.kernels.launch import Launch, configure, describe, table_of
from llmq.kernels.layout import Tiled
from llmq.kernels.problem import Packed, Problem
from llmq.kernels.registry import KERNELS

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)


@dataclass(frozen=True)
class Shape:
    """The shape of a linear."""

    k: int
    """Inputs."""
    n: int
    """Outputs."""
    layer: str = ""
    """The model's layers of this shape, for the reader."""

    def __str__(self) -> str:
        return f"{self.k}x{self.n}"


SHAPES = (
    Shape(4096, 4096, "Llama-3-8B o, q"),
    Shape(4096, 14336, "Llama-3-8B gate, up"),
    Shape(8192, 8192),
    Shape(8192, 28672),
    Shape(4096, 28672, "Llama-3-8B gate and up"),
    Shape(14336, 4096, "Llama-3-8B down"),
    Shape(4096, 6144, "Llama-3-8B q, k and v"),
    Shape(4096, 1024, "Llama-3-8B k, v"),
)


@dataclass(frozen=True)
class KernelBenchConfig:
    """What to measure. Raises `LlmqError` for sizes out of range and for a missing folder of tables."""

    device: torch.device
    """Where everything runs."""
    dtype: torch.dtype
    """Of x, y and the scales."""
    group_size: int
    """Columns per scale; 0 per channel."""
    symmetric: bool
    """Whether weights have no zero points."""
    shapes: tuple[Shape, ...] = SHAPES
    """The linears."""
    rows: tuple[int, ...] = ROWS
    """M: each number of rows of x."""
    seconds: float = 400.0
    """The time box."""
    seed: int = 0
    """Of weights and inputs."""
    effort: Effort = Effort()  # noqa: RUF009 (frozen)
    """Samples per timing."""
    tables: Path | None = None
    """A folder of measured launch tables to use instead of the package's own."""
    bits: int = 4
    """Of a weight code."""

    def __post_init__(self) -> None:
        if min(self.rows) < 1:
            raise LlmqError(f"rows must be at least 1; got {min(self.rows)}")
        if self.group_size < 0:
            raise LlmqError(f"group must be a number of columns, or 0 for one per channel; got {self.group_size}")
        if self.tables is not None and not self.tables.is_dir():
            raise LlmqError(f"the folder {self.tables} of launch tables does not exist")


@dataclass(frozen=True)
class Contender:
    """A kernel or a rival, applied to one weight."""

    name: str
    """Of the kernel or the rival."""
    ours: bool
    """True for a kernel of the registry, which must be exact up to rounding and repeat to the bit."""
    prepare: Callable[[Packed], Any]
    """Make the runtime layout of the weight."""
    run: Callable[[Tensor, Any], Tensor]
    """(x, runtime layout) -> y."""
    nbytes: int
    """Bytes of the weight that a call reads."""
    launch: Callable[[int], str | None] = lambda rows: None
    """The launch configuration for M rows, as text."""


def problem_of(packed: Packed, dtype: torch.dtype) -> Problem:
    """The problem of a weight and x of `dtype`."""
    sizes = (packed.out_features, packed.in_features, packed.bits, packed.group_size)
    return Problem(*sizes, packed.zero is None, packed.scale.dtype, dtype, packed.weight.device.type)


def contenders(packed: Packed, config: KernelBenchConfig) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that take the problem, ours first, and the reason for each one that does not."""
    problem = problem_of(packed, config.dtype)
    stored = packed.weight.nbytes + packed.scale.nbytes + (0 if packed.zero is None else packed.zero.nbytes)
    listed, absent = [], {}
    for kernel in KERNELS:
        reason = (
            "is the specification, not a way to run"
            if kernel.name == reference.KERNEL.name
            else kernel.refusal(problem)
        )
        if reason is None:
            run: Callable[..., Tensor] = kernel.run
            launch: Callable[[int], str | None] = partial(_described, kernel, problem, config.device)
            if kernel.name == wna16.KERNEL.name and config.tables is not None:
                run, launch = _with_tables(config, config.tables, packed)
            listed.append(Contender(kernel.name, True, kernel.prepare, run, stored, launch))
        else:
            absent[kernel.name] = reason
    for rival in rivals.RIVALS:
        reason = rival.refusal(problem)
        if reason is None:
            nbytes = packed.out_features * packed.in_features * 2 if rival is rivals.DENSE else stored
            prepare = partial(_prepared, rival, config.dtype)
            listed.append(Contender(rival.name, False, prepare, rival.run, nbytes))
        else:
            absent[rival.name] = reason
    return listed, absent


def _described(kernel: Kernel, problem: Problem, device: torch.device, rows: int) -> str | None:
    return kernel.describe_launch(problem, rows, device)


def _prepared(rival: rivals.Rival, dtype: torch.dtype, packed: Packed) -> Any:
    return rival.prepare(packed, dtype)


def _with_tables(
    config: KernelBenchConfig, folder: Path, packed: Packed
) -> tuple[Callable[..., Tensor], Callable[[int], str]]:
    """The Triton kernel with the launches of the tables in a folder."""
    device = wna16.device_of(config.device)
    table, common = table_of(device, folder), (wna16.DTYPES[config.dtype], config.group_size)

    def launch(rows: int) -> Launch:
        return configure(device, *common, rows, packed.out_features, packed.in_features, table, config.bits)

    def run(x: Tensor, tiled: Tiled) -> Tensor:
        return wna16.multiply(x, tiled, None, launch(x.shape[0]))

    def description(rows: int) -> str:
        return describe(device, *common, rows, packed.out_features, packed.in_features, table, config.bits)

    return run, description
