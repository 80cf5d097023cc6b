"""Times of every kernel and its rivals for a grid of shapes and numbers of rows. Correctness is checked before anything is timed.

    for each shape:  draw a weight and x, compute the exact result (`truth`)
        for each contender (our kernels, then the rivals):
            check    every M of the grid against float64, twice with equal bits; a contender that fails is not timed here
            time     every M, on rotated copies of the weight (`timing`); the last timed output is checked too

A row has microseconds, the dense matmul's time divided by it, and the share of the roofline: floor / time, where floor is
the larger of (bytes that must move / measured copy bandwidth) and (FLOPs / measured dense matmul rate). Bytes that must
move: the contender's weight as it is stored (dense for `dense`), x and y, once each. So the share says how near a kernel is
to the best that its own storage allows; its gain over dense is the other column.

Time-boxed: what does not start in time is listed. Left out: bias, autograd, host time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmq.bench.kernels import rivals
from llmq.bench.kernels.contenders import Contender, KernelBenchConfig, Shape, contenders, problem_of
from llmq.bench.kernels.timing import Budget, Ceilings, Timing, copies_of, time_calls
from llmq.bench.kernels.truth import RIVAL_TOLERANCE, Truth, draw, draw_input, judge, truth
from llmq.kernels import slab
from llmq.kernels.problem import Packed
from llmq.kernels.registry import choose

MIN_SLAB_ROWS = 64
RIVAL_SHARE = 0.15  # of the time box, for the first calls of one rival


@dataclass
class BenchResults:
    """The results of a run, filled while it runs."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per shape, contender and M."""
    wrong: list[str] = field(default_factory=list)
    """Failures of our own kernels. Any of them makes the run fail."""
    absent: dict[str, str] = field(default_factory=dict)
    """Contender, or contender at a shape -> the reason why it was not measured."""
    skipped: list[str] = field(default_factory=list)
    """What the time box left out."""
    first_call_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that each rival spent in `prepare` and its correctness check, where rivals tune themselves."""


def bench(config: KernelBenchConfig, limits: Ceilings, results: BenchResults, done: Callable[[str], None]) -> None:
    """Measure a config into `results`. done: called with a line of text after each contender, when its rows are complete."""
    budget = Budget(config.seconds)
    for shape in config.shapes:
        if budget.over():
            results.skipped.append(str(shape))
            continue
        try:
            _shape(config, shape, limits, budget, results, done)
        except torch.OutOfMemoryError as error:  # one shape that does not fit must not stop the others
            results.skipped.append(f"{shape}: {str(error).splitlines()[0]}")


def _shape(
    config: KernelBenchConfig,
    shape: Shape,
    limits: Ceilings,
    budget: Budget,
    results: BenchResults,
    done: Callable[[str], None],
) -> None:
    generator = torch.Generator(config.device).manual_seed(config.seed + shape.k + 31 * shape.n)
    packed = draw(
        generator, shape.n, shape.k, config.group_size or shape.k, config.symmetric, config.dtype, config.bits
    )
    x = draw_input(generator, max(config.rows), shape.k, config.dtype)
    expected, first_row = truth(x, packed), len(results.rows)
    listed, absent = contenders(packed, config)
    results.absent |= absent
    for contender in listed:
        spent = results.first_call_seconds.get(contender.name, 0.0)
        if budget.over():
            results.skipped.append(f"{shape} {contender.name}")
        elif spent > RIVAL_SHARE * config.seconds and contender.name != rivals.DENSE.name:
            results.absent[f"{contender.name} at {shape}"] = (
                f"spent {spent:.0f} s in first calls: its share of the time box"
            )
        else:
            _contend(config, shape, contender, (packed, x, expected), budget, results)
            _compare(results.rows[first_row:], limits)
            done(f"{shape} {contender.name}: {budget.spent():.0f} of {config.seconds:.0f} s")


def _contend(
    config: KernelBenchConfig,
    shape: Shape,
    one: Contender,
    inputs: tuple[Packed, Tensor, Truth],
    budget: Budget,
    results: BenchResults,
) -> None:
    """Check, then time one contender at one shape."""
    packed, x, expected = inputs
    preferred = {rows: choose(problem_of(packed, config.dtype), rows).kernel.name for rows in config.rows}
    slab_name = slab.KERNEL.name
    measured = [m for m in config.rows if one.name != slab_name or m >= MIN_SLAB_ROWS or preferred[m] == slab_name]
    started = budget.spent()
    try:
        runtime = one.prepare(packed)
        errors = check_contender(one, runtime, x, expected, measured)
        if not one.ours:
            results.first_call_seconds[one.name] = (
                results.first_call_seconds.get(one.name, 0.0) + budget.spent() - started
            )
        copies = copies_of(runtime, one.nbytes, config.device)
        for rows in measured:
            if budget.over():
                results.skipped.append(f"{shape} {one.name} M={rows}")
                continue
            part = x[:rows]
            timing = time_calls([partial(one.run, part, copy) for copy in copies], config.device, config.effort)
            _judged(one, timing.output, expected, rows)
            row = {"shape": str(shape), "layer": shape.layer, "k": shape.k, "n": shape.n, "m": rows}
            row |= {"what": one.name, "ours": one.ours, "preferred": preferred[rows] == one.name}
            row |= {"error": errors[rows], "launch": one.launch(rows), "copies": len(copies)}
            results.rows.append(row | _figures(timing) | _needs(shape, rows, one))
    # A kernel may fail in any way (compiler, driver, a rival's own error): record it and measure the next one.
    except Exception as error:
        results.rows[:] = [r for r in results.rows if (r["shape"], r["what"]) != (str(shape), one.name)]
        why = f"{one.name} at {shape}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if one.ours:
            results.wrong.append(why)
        else:
            results.absent[f"{one.name} at {shape}"] = why.partition(": ")[2]


class WrongResult(Exception):
    """A contender computed a wrong result; it is not timed."""


def check_contender(one: Contender, runtime: Any, x: Tensor, expected: Truth, rows: Sequence[int]) -> dict[int, float]:
    """The error at every M of `rows`. Raises `WrongResult` if one is wrong, or if ours is not bit-equal when repeated."""
    errors = {}
    for count in rows:
        y = one.run(x[:count], runtime)
        errors[count] = _judged(one, y, expected, count)
        if one.ours and not torch.equal(y, one.run(x[:count], runtime)):
            raise WrongResult(f"M={count} is not bit-equal when repeated")
    return errors


def _judged(one: Contender, y: Tensor, expected: Truth, rows: int) -> float:
    verdict = judge(y, expected, None if one.ours else RIVAL_TOLERANCE)
    if verdict.wrong is not None:
        raise WrongResult(f"the result for M={rows} {verdict.wrong}")
    return verdict.error


def _figures(timing: Timing) -> dict[str, Any]:
    return {"us": timing.us, "spread": timing.spread, "calls": timing.calls, "samples": timing.samples}


def _needs(shape: Shape, rows: int, one: Contender) -> dict[str, int]:
    """The least bytes to move and operations to compute."""
    return {"bytes": one.nbytes + 2 * rows * (shape.k + shape.n), "flops": 2 * rows * shape.k * shape.n}


def _compare(rows: list[dict[str, Any]], limits: Ceilings) -> None:
    """Add the speed-up over the dense weight (None if that was not timed) and the share of the roofline to rows of a shape."""
    base = {row["m"]: row["us"] for row in rows if row["what"] == rivals.DENSE.name}
    for row in rows:
        floor, bound = limits.floor_us(row["bytes"], row["flops"])
        row["speedup"] = base[row["m"]] / row["us"] if row["m"] in base else None
        row |= {"roofline": floor / row["us"], "bound": bound}
