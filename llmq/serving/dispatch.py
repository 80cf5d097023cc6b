"""Which kernel, with which launch configuration, runs each packed linear of a model; and running each of them once.

`explain` describes it and `warmup` does it: kernels that are compiled for every new problem, as Triton's are, are
compiled there and not during the first forward. Fused linears (`llmq.serving.fused`) are described and run as one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmq.errors import LlmqError
from llmq.kernels.registry import Choice
from llmq.names import compact_names
from llmq.serving.fused import FusedLinears, fused_linears, make_ready, model_dtype
from llmq.serving.linear import QuantLinear

MANY_ROWS = 512


@dataclass(frozen=True)
class Explanation:
    """One row of `explain`: how one linear is run."""

    name: str
    """The linear's module name."""
    grid: str
    """Its grid, as in `int4 g128 sym`."""
    few_rows: str
    """The kernel for `rows` rows of input."""
    many_rows: str
    """The kernel for `MANY_ROWS` rows of input."""
    reasons: tuple[str, ...]
    """Why other kernels are not used: `1 row: KERNEL REASON`, or `KERNEL REASON` where it is used for neither."""
    rows: int = 1
    """The number of rows that `few_rows` is for."""
    launch: str | None = None
    """The launch configuration for `rows` rows; None where the kernel has none."""
    fused: tuple[str, ...] = ()
    """The last parts of the names of the linears that run as one matmul for `rows` rows, this one included."""

    def __str__(self) -> str:
        return f"{self.name}: {self.summary}"

    @property
    def summary(self) -> str:
        """All fields but the name, as text."""
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        few = self.few_rows + (f" {self.launch}" if self.launch else "")
        few += f" for {', '.join(self.fused)} as one" if self.fused else ""
        return f"{self.grid}; {_counted(self.rows)}: {few}; {MANY_ROWS} rows: {self.many_rows}{why}"


class Explanations(list[Explanation]):
    """One row per linear, in the model's order. Printing it groups linears with the same summary."""

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for row in self:
            groups.setdefault(row.summary, []).append(row.name)
        return "\n".join(
            "\n    ".join((f"{len(names)} linear{'s' * (len(names) > 1)}: {summary}", *compact_names(names)))
            for summary, names in groups.items()
        )


def explain(model: nn.Module, dtype: torch.dtype | None = None, rows: int = 1) -> Explanations:
    """Which kernel runs each quantized linear of `model`, and why the others do not.

    dtype: of activations (default: the model's). rows: the small number of input rows to explain, besides `MANY_ROWS`.
    `print(explain(model))` groups linears that differ in name only. Raises `LlmqError` for fewer than 1 row.
    """
    dtype = dtype or model_dtype(model)
    _check(rows, dtype)
    return Explanations(
        _explained(name, module, dtype, rows)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    )


def _explained(name: str, module: QuantLinear, dtype: torch.dtype, rows: int) -> Explanation:
    few, many, linear = module.choice(dtype, rows), module.choice(dtype, MANY_ROWS), module
    fused: tuple[str, ...] = ()
    if isinstance(module.fusion, FusedLinears):
        stacked = module.fusion.stacked.choice(dtype, rows)
        if stacked.kernel.JOINS:
            few, linear = stacked, module.fusion.stacked
            fused = tuple(member.rpartition(".")[2] for member in module.fusion.names)
    grid = module.scheme.weight
    size = "channel" if grid.group_size is None else f"g{grid.group_size}"
    return Explanation(
        name,
        f"int{grid.bits} {size} {'sym' if grid.symmetric else 'asym'}",
        few.kernel.NAME,
        many.kernel.NAME,
        _reasons(few, many, rows),
        rows,
        few.kernel.launch_of(linear.problem(dtype), rows, linear.device),
        fused,
    )


def _reasons(few: Choice, many: Choice, rows: int) -> tuple[str, ...]:
    always = dict.fromkeys(refused for refused in few.refused if refused in many.refused)
    reasons = [f"{kernel} {why}" for kernel, why in always]
    for count, choice in ((rows, few), (MANY_ROWS, many)):
        reasons += [
            f"{_counted(count)}: {kernel} {why}" for kernel, why in choice.refused if (kernel, why) not in always
        ]
    return tuple(reasons)


@dataclass(frozen=True)
class Warmed:
    """A problem that `warmup` ran once."""

    kernel: str
    """The kernel's name."""
    rows: int
    """M, the rows of the input."""
    n: int
    """Output features."""
    k: int
    """Input features."""
    launch: str | None
    """The launch configuration; None where the kernel has none."""
    seconds: float
    """How long the run took, compilation included."""


@torch.no_grad()
def warmup(model: nn.Module, rows: int | Sequence[int] = 1, dtype: torch.dtype | None = None) -> list[Warmed]:
    """Make the layouts that forwards of `model` need, and run each distinct problem once.

    rows: of the linears' input (sequences times tokens per forward), one number or several. Numbers with the same
    launch configuration count as one problem. dtype: of activations (default: the model's).
    Offloaded weights are skipped. Raises `LlmqError` for fewer than 1 row.
    """
    dtype, done = dtype or model_dtype(model), dict[tuple[object, ...], Warmed]()
    for count in [rows] if isinstance(rows, int) else rows:
        _check(count, dtype)
        make_ready(model, dtype, count)
        for linear in _linears_to_run(model, dtype, count):
            problem = linear.problem(dtype)
            kernel = linear.choice(dtype, count).kernel
            launch = kernel.launch_of(problem, count, linear.device)
            biased = linear._bias(dtype) is not None
            key = (kernel.NAME, problem, launch or count, linear.device, biased)
            if key not in done:
                seconds = _timed_run(linear, count, dtype)
                done[key] = Warmed(kernel.NAME, count, problem.rows, problem.columns, launch, seconds)
    return list(done.values())


def _linears_to_run(model: nn.Module, dtype: torch.dtype, rows: int) -> Iterator[QuantLinear]:
    """What a forward runs for M = `rows`: stacked linears where their kernel can fuse, all others one by one."""
    stacked = [group.stacked for group in fused_linears(model)]
    stacked = [linear for linear in stacked if linear.choice(dtype, rows).kernel.JOINS]
    covered = {id(member) for linear in stacked for member in linear.members}
    yield from stacked
    for module in model.modules():
        if isinstance(module, QuantLinear) and id(module) not in covered and not module.offloaded:
            yield module


def _timed_run(linear: QuantLinear, rows: int, dtype: torch.dtype) -> float:
    """Run a linear once on zeros; returns seconds."""
    began = time.perf_counter()
    linear._run(torch.zeros(rows, linear.in_features, dtype=dtype, device=linear.device))
    if linear.device.type == "cuda":
        torch.cuda.synchronize(linear.device)
    return time.perf_counter() - began


def _check(rows: int, dtype: torch.dtype) -> None:
    if not isinstance(rows, int):
        raise LlmqError(f"rows must be an integer; got {rows!r}")
    if rows < 1:
        raise LlmqError(f"rows must be at least 1; got {rows}")
    if not isinstance(dtype, torch.dtype):
        raise LlmqError(f"dtype must be a torch.dtype; got {dtype!r}")


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"
