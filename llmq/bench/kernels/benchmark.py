"""Times of every kernel beside its rivals, for a grid of shapes and rows: first the gate, then the clock.

    for each shape:  draw a weight, x and the truth (`truth`)
        for each contender (our kernels, then the rivals):
            gate     every M of the grid against float64, twice with the same bits; who fails is not timed at this shape at all
            clock    every M, on rotated copies of the weight (`timing`); the output of the last timed call is judged, too

A row: microseconds, the dense matmul's time over it, and the share of the roofline, floor / time, where floor is the larger
of (bytes that must move / measured copy bandwidth) and (FLOPs / measured dense matmul). Bytes that must move: the
contender's weight as it is stored (a dense one for `dense`), x and y once. So a share says how near a kernel is to
the best that its own storage allows, and what it gains over dense stands in the other column.

Time-boxed: what is not begun when the seconds are over is listed, not dropped. Left out: bias, autograd, host time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.bench.kernels import rivals
from llmq.bench.kernels.timing import Budget, Ceilings, Effort, Timing, copies_of, measure
from llmq.bench.kernels.truth import RIVAL_TOLERANCE, Truth, draw, draw_input, judge, truth
from llmq.errors import LlmqError
from llmq.kernels import reference, slab, wna16
from llmq.kernels.launch import Launch, configure, table_of, told
from llmq.kernels.layout import Tiled
from llmq.kernels.problem import Packed, Problem
from llmq.kernels.registry import KERNELS, choose

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
LEAST_SLAB_ROWS = 64
RIVAL_SHARE = 0.15


@dataclass(frozen=True)
class Shape:
    """A linear: K inputs, N outputs. layer: of which model, for the reader."""

    k: int
    n: int
    layer: str = ""

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
class Plan:
    """What to measure. dtype: of x, y and scales. group_size: columns per scale, 0 per channel. seconds: the time box.

    tables: a folder of measured launch tables in the place of the package's own. effort: samples, sizes of the ceilings.
    `LlmqError` for sizes that are none, and where there is no such folder.
    """

    device: torch.device
    dtype: torch.dtype
    group_size: int
    symmetric: bool
    shapes: tuple[Shape, ...] = SHAPES
    rows: tuple[int, ...] = ROWS
    seconds: float = 400.0
    seed: int = 0
    effort: Effort = Effort()  # noqa: RUF009 (frozen)
    tables: Path | None = None
    bits: int = 4

    def __post_init__(self) -> None:
        if min(self.rows) < 1:
            raise LlmqError(f"rows must be 1 or more; got {min(self.rows)}")
        if self.group_size < 0:
            raise LlmqError(f"the group must be a number of columns, or 0 for one per channel; got {self.group_size}")
        if self.tables is not None and not self.tables.is_dir():
            raise LlmqError(f"there is no folder {self.tables} of launch tables")


@dataclass(frozen=True)
class Contender:
    """ours: a kernel of the registry, which must be exact to rounding and repeat to the bit. nbytes: of the weight it reads."""

    name: str
    ours: bool
    prepare: Callable[[Packed], Any]
    run: Callable[[Tensor, Any], Tensor]
    nbytes: int
    launch: Callable[[int], str | None] = lambda rows: None


@dataclass
class Findings:
    """What a run fills. wrong: (shape, contender, why) of our kernels: any of it makes the run a failure."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    tuned: dict[str, float] = field(default_factory=dict)


def bench(plan: Plan, limits: Ceilings, findings: Findings, done: Callable[[str], None]) -> None:
    """Measure a plan into `findings`. done: is given a line after each contender, when all rows so far are whole."""
    budget = Budget(plan.seconds)
    for shape in plan.shapes:
        if budget.over():
            findings.skipped.append(str(shape))
            continue
        try:
            _shape(plan, shape, limits, budget, findings, done)
        except torch.OutOfMemoryError as error:  # the truth of one shape must not cost the others
            findings.skipped.append(f"{shape}: {str(error).splitlines()[0]}")


def problem_of(packed: Packed, dtype: torch.dtype) -> Problem:
    """The problem that a weight and x of `dtype` pose."""
    sizes = (packed.rows, packed.columns, packed.bits, packed.group_size)
    return Problem(*sizes, packed.zero is None, packed.scale.dtype, dtype, packed.weight.device.type)


def contenders(packed: Packed, plan: Plan) -> tuple[list[Contender], dict[str, str]]:
    """Who takes the problem, ours first, and why each of the others does not."""
    problem = problem_of(packed, plan.dtype)
    stored = packed.weight.nbytes + packed.scale.nbytes + (0 if packed.zero is None else packed.zero.nbytes)
    found, absent = [], {}
    for kernel in KERNELS:
        reason = "is the specification, not a way to run" if kernel is reference else kernel.refusal(problem)
        if reason is None:
            run: Callable[..., Tensor] = kernel.run
            launch: Callable[[int], str | None] = partial(kernel.launch_of, problem, device=plan.device)
            if kernel is wna16 and plan.tables is not None:
                run, launch = _tabled(plan, plan.tables, packed)
            found.append(Contender(kernel.NAME, True, kernel.prepare, run, stored, launch))
        else:
            absent[kernel.NAME] = reason
    for rival in rivals.RIVALS:
        reason = rival.refusal(problem)
        if reason is None:
            nbytes = packed.rows * packed.columns * 2 if rival is rivals.DENSE else stored
            found.append(Contender(rival.name, False, partial(_prepared, rival, plan.dtype), rival.run, nbytes))
        else:
            absent[rival.name] = reason
    return found, absent


def _prepared(rival: rivals.Rival, dtype: torch.dtype, packed: Packed) -> Any:
    return rival.prepare(packed, dtype)


def _tabled(plan: Plan, folder: Path, packed: Packed) -> tuple[Callable[..., Tensor], Callable[[int], str]]:
    """The Triton kernel with the launches of a folder's table."""
    device = wna16.device_of(plan.device)
    table, kind = table_of(device, folder), (wna16.DTYPES[plan.dtype], plan.group_size)

    def launch(rows: int) -> Launch:
        return configure(device, *kind, rows, packed.rows, packed.columns, table, plan.bits)

    def run(x: Tensor, tiled: Tiled) -> Tensor:
        return wna16.multiply(x, tiled, None, launch(x.shape[0]))

    def words(rows: int) -> str:
        return told(device, *kind, rows, packed.rows, packed.columns, table, plan.bits)

    return run, words


def _shape(
    plan: Plan, shape: Shape, limits: Ceilings, budget: Budget, findings: Findings, done: Callable[[str], None]
) -> None:
    generator = torch.Generator(plan.device).manual_seed(plan.seed + shape.k + 31 * shape.n)
    packed = draw(generator, shape.n, shape.k, plan.group_size or shape.k, plan.symmetric, plan.dtype, plan.bits)
    x = draw_input(generator, max(plan.rows), shape.k, plan.dtype)
    wanted, begun = truth(x, packed), len(findings.rows)
    found, absent = contenders(packed, plan)
    findings.absent |= absent
    for contender in found:
        spent = findings.tuned.get(contender.name, 0.0)
        if budget.over():
            findings.skipped.append(f"{shape} {contender.name}")
        elif spent > RIVAL_SHARE * plan.seconds and contender.name != rivals.DENSE.name:
            findings.absent[f"{contender.name} at {shape}"] = (
                f"spent {spent:.0f} s in first calls: its share of the time"
            )
        else:
            _contend(plan, shape, contender, (packed, x, wanted), budget, findings)
            _compare(findings.rows[begun:], limits)
            done(f"{shape} {contender.name}: {budget.spent():.0f} of {plan.seconds:.0f} s")


def _contend(
    plan: Plan, shape: Shape, one: Contender, given: tuple[Packed, Tensor, Truth], budget: Budget, findings: Findings
) -> None:
    """Gate, then time one contender at one shape."""
    packed, x, wanted = given
    preferred = {rows: choose(problem_of(packed, plan.dtype), rows).kernel.NAME for rows in plan.rows}
    asked = [m for m in plan.rows if one.name != slab.NAME or m >= LEAST_SLAB_ROWS or preferred[m] == slab.NAME]
    started = budget.spent()
    try:
        runtime = one.prepare(packed)
        errors = gate(one, runtime, x, wanted, asked)
        if not one.ours:
            findings.tuned[one.name] = findings.tuned.get(one.name, 0.0) + budget.spent() - started
        copies = copies_of(runtime, one.nbytes, plan.device)
        for rows in asked:
            if budget.over():
                findings.skipped.append(f"{shape} {one.name} M={rows}")
                continue
            part = x[:rows]
            timing = measure([partial(one.run, part, copy) for copy in copies], plan.device, plan.effort)
            _judged(one, timing.output, wanted, rows)
            row = {"shape": str(shape), "layer": shape.layer, "k": shape.k, "n": shape.n, "m": rows}
            row |= {"what": one.name, "ours": one.ours, "preferred": preferred[rows] == one.name}
            row |= {"error": errors[rows], "launch": one.launch(rows), "copies": len(copies)}
            findings.rows.append(row | _figures(timing) | _needs(shape, rows, one))
    # A kernel may fail in any way (a compiler's, a driver's, a rival's own): it is told, and the next one is measured.
    except Exception as error:
        findings.rows[:] = [r for r in findings.rows if (r["shape"], r["what"]) != (str(shape), one.name)]
        why = f"{one.name} at {shape}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if one.ours:
            findings.wrong.append(why)
        else:
            findings.absent[f"{one.name} at {shape}"] = why.partition(": ")[2]


class WrongResult(Exception):
    """A contender computed something else; it gets no time."""


def gate(one: Contender, runtime: Any, x: Tensor, wanted: Truth, rows: Sequence[int]) -> dict[int, float]:
    """The error at every M of `rows`. `WrongResult` where one is wrong, or ours gives other bits the second time."""
    errors = {}
    for count in rows:
        y = one.run(x[:count], runtime)
        errors[count] = _judged(one, y, wanted, count)
        if one.ours and not torch.equal(y, one.run(x[:count], runtime)):
            raise WrongResult(f"M={count} gives other bits the second time")
    return errors


def _judged(one: Contender, y: Tensor, wanted: Truth, rows: int) -> float:
    verdict = judge(y, wanted, None if one.ours else RIVAL_TOLERANCE)
    if verdict.wrong is not None:
        raise WrongResult(f"the result for M={rows} {verdict.wrong}")
    return verdict.error


def _figures(timing: Timing) -> dict[str, Any]:
    return {"us": timing.us, "spread": timing.spread, "calls": timing.calls, "samples": timing.samples}


def _needs(shape: Shape, rows: int, one: Contender) -> dict[str, int]:
    """What must be moved and computed at the least, in bytes and operations."""
    return {"bytes": one.nbytes + 2 * rows * (shape.k + shape.n), "flops": 2 * rows * shape.k * shape.n}


def _compare(rows: list[dict[str, Any]], limits: Ceilings) -> None:
    """Speed-up over the dense weight (None where that was not timed) and share of the roofline, into the rows of a shape."""
    base = {row["m"]: row["us"] for row in rows if row["what"] == rivals.DENSE.name}
    for row in rows:
        floor, bound = limits.floor_us(row["bytes"], row["flops"])
        row["speedup"] = base[row["m"]] / row["us"] if row["m"] in base else None
        row |= {"roofline": floor / row["us"], "bound": bound}
