"""Which kernel, with which launch, runs each packed linear of a model; and launching each of them once.

`explain` says it in words, `warmup` does it: a kernel that is compiled for every new problem, as Triton's are, is compiled then
and not in the first answer. Linears that are run as one (`llmq.serving.fused`) are told and launched as one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmq.errors import LlmqError
from llmq.kernels.registry import Choice
from llmq.names import gathered_names
from llmq.serving.fused import Joined, joined_linears, make_ready, model_dtype
from llmq.serving.linear import QuantLinear

MANY_ROWS = 512


@dataclass(frozen=True)
class Explanation:
    """One row of `explain`: a linear, its grid in words, the kernels for few rows of input and for many, and why not others.

    rows: how many are few. launch: the configuration for them, None where the kernel has none. joined: the linears that
    are run as one for them, this one among them. reasons: "1 row: KERNEL WHY", or "KERNEL WHY" where it is used in neither case.
    """

    name: str
    grid: str
    few_rows: str
    many_rows: str
    reasons: tuple[str, ...]
    rows: int = 1
    launch: str | None = None
    joined: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.told}"

    @property
    def told(self) -> str:
        """All but the name, in words."""
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        few = self.few_rows + (f" {self.launch}" if self.launch else "")
        few += f" for {', '.join(self.joined)} as one" if self.joined else ""
        return f"{self.grid}; {_counted(self.rows)}: {few}; {MANY_ROWS} rows: {self.many_rows}{why}"


class Explanations(list[Explanation]):
    """One row per linear, in the model's order; printed, linears of which the same is told are told together."""

    def __str__(self) -> str:
        alike: dict[str, list[str]] = {}
        for row in self:
            alike.setdefault(row.told, []).append(row.name)
        return "\n".join(
            "\n    ".join((f"{len(names)} linear{'s' * (len(names) > 1)}: {told}", *gathered_names(names)))
            for told, names in alike.items()
        )


def explain(model: nn.Module, dtype: torch.dtype | None = None, rows: int = 1) -> Explanations:
    """Which kernel runs each quantized linear of `model`, and why not the others.

    Each row's fields are an `Explanation`'s; `print(explain(model))` tells linears together that differ in name only.

    dtype: of activations (default: the model's). rows: of the input, the few; `LlmqError` below 1.
    """
    kind = dtype or model_dtype(model)
    _check(rows, kind)
    return Explanations(
        _explained(name, module, kind, rows)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    )


def _explained(name: str, module: QuantLinear, dtype: torch.dtype, rows: int) -> Explanation:
    few, many, run = module.choice(dtype, rows), module.choice(dtype, MANY_ROWS), module
    joined: tuple[str, ...] = ()
    if isinstance(module.together, Joined):
        whole = module.together.whole.choice(dtype, rows)
        if whole.kernel.supports_fusion:
            few, run = whole, module.together.whole
            joined = tuple(member.rpartition(".")[2] for member in module.together.names)
    size = "channel" if module.grid.group_size is None else f"g{module.grid.group_size}"
    return Explanation(
        name,
        f"int{module.grid.bits} {size} {'sym' if module.grid.symmetric else 'asym'}",
        few.kernel.name,
        many.kernel.name,
        _reasons(few, many, rows),
        rows,
        few.kernel.describe_launch(run.problem(dtype), rows, run.device),
        joined,
    )


def _reasons(few: Choice, many: Choice, rows: int) -> tuple[str, ...]:
    always = dict.fromkeys(refused for refused in few.refused if refused in many.refused)
    told = [f"{kernel} {why}" for kernel, why in always]
    for count, choice in ((rows, few), (MANY_ROWS, many)):
        told += [f"{_counted(count)}: {kernel} {why}" for kernel, why in choice.refused if (kernel, why) not in always]
    return tuple(told)


@dataclass(frozen=True)
class Warmed:
    """A problem that `warmup` ran once: the kernel, M, N and K, its launch in words, and the seconds that it took."""

    kernel: str
    rows: int
    n: int
    k: int
    launch: str | None
    seconds: float


@torch.no_grad()
def warmup(model: nn.Module, rows: int | Sequence[int] = 1, dtype: torch.dtype | None = None) -> list[Warmed]:
    """Make the layouts that forwards of `model` need, and run each distinct problem once.

    rows: of the linears' input (sequences times tokens in a forward), one number or several. dtype: of activations
    (default: the model's). Numbers of rows with one launch count as one problem. Offloaded weights are left alone.
    Raises `LlmqError` for a number below 1.
    """
    kind, done = dtype or model_dtype(model), dict[tuple[object, ...], Warmed]()
    for count in [rows] if isinstance(rows, int) else rows:
        _check(count, kind)
        make_ready(model, kind, count)
        for linear in _runs(model, kind, count):
            problem = linear.problem(kind)
            kernel = linear.choice(kind, count).kernel
            launch = kernel.describe_launch(problem, count, linear.device)
            biased = linear._bias(kind) is not None
            key = (kernel.name, problem, launch or count, linear.device, biased)
            if key not in done:
                seconds = _once(linear, count, kind)
                done[key] = Warmed(kernel.name, count, problem.out_features, problem.in_features, launch, seconds)
    return list(done.values())


def _runs(model: nn.Module, dtype: torch.dtype, rows: int) -> Iterator[QuantLinear]:
    """What is run for M = `rows`: linears, and those that are one as one."""
    joining = [one.whole for one in joined_linears(model) if one.whole.choice(dtype, rows).kernel.supports_fusion]
    covered = {id(member) for whole in joining for member in whole.members}
    yield from joining
    for module in model.modules():
        if isinstance(module, QuantLinear) and id(module) not in covered and not module.streamed:
            yield module


def _once(linear: QuantLinear, rows: int, dtype: torch.dtype) -> float:
    """Seconds of one run on zeros."""
    began = time.perf_counter()
    linear._run(torch.zeros(rows, linear.in_features, dtype=dtype, device=linear.device))
    if linear.device.type == "cuda":
        torch.cuda.synchronize(linear.device)
    return time.perf_counter() - began


def _check(rows: int, dtype: torch.dtype) -> None:
    if not isinstance(rows, int):
        raise LlmqError(f"rows must be whole numbers; got {rows!r}")
    if rows < 1:
        raise LlmqError(f"rows must be at least 1; got {rows}")
    if not isinstance(dtype, torch.dtype):
        raise LlmqError(f"dtype must be a torch.dtype; got {dtype!r}")


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"
