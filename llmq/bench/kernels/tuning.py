"""Sweep the configurations of the Triton kernel on the current device, and write the table that `llmq.kernels.launch` reads.

    for each task (dtype, group, bucket, N, K), the most important first:
        every BN x warps x stages x split that fits: multiply, compare with float64, repeat with equal bits, a quick timing
        the three fastest once more, with all samples: the fastest of them becomes the row

A configuration that does not compile or launch, or that gives a wrong result, is discarded and counted by reason. A bucket is
measured at its largest M; the bucket of 8 at M = 1, for decoding. Tables hold the times of symmetric weights: zero points
cost one more load and change no choice.
A sweep that its time box ends leaves a valid table; a later sweep with the same file continues there. `crossover` holds the
times of the Triton and the slab kernel for M around `wna16.MAX_ROWS`. Left out: tuning at run time.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.bench.kernels.timing import QUICK, Budget, Effort, copies_of, time_calls
from llmq.bench.kernels.truth import Truth, draw, draw_input, judge, truth
from llmq.bench.record import write
from llmq.errors import LlmqError
from llmq.kernels import slab, wna16
from llmq.kernels.launch import Device, Launch, TunedLaunch, buckets, configure, form_of, rows_of
from llmq.kernels.layout import Tiled
from llmq.kernels.problem import Packed

SIZES = ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672), (14336, 4096))  # K, N
SPLITS = (1, 2, 4, 8, 16)
MAX_BLOCKS = 16  # per processor; beyond it more parts of K cannot help
FINALISTS = 3
WRONG = "wrong result"
UNSTABLE = "not bit-equal when repeated"
CROSSOVER_ROWS = (64, 128, 192, 256, 384, 512, 1024)


@dataclass(frozen=True)
class TuningTask:
    """One row of a table to measure."""

    dtype: str
    """float16 or bfloat16."""
    group: int
    """Columns per scale; 0 per channel."""
    size: int
    """The bucket: rows of x in a block."""
    n: int
    """Rows of the weight."""
    k: int
    """Columns of the weight."""
    bits: int = 4
    """Of a weight code."""

    @property
    def weights(self) -> tuple[str, int, int]:
        """(dtype, bits, group): what all weights of one compiled kernel have in common."""
        return self.dtype, self.bits, self.group

    @property
    def rows(self) -> int:
        """The M at which it is measured."""
        return 1 if self.size == 8 else self.size


@dataclass
class Sweep:
    """The results of a sweep, filled while it runs."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """The rows of the table."""
    discarded: Counter[str] = field(default_factory=Counter)
    """How many configurations were discarded, by reason."""
    skipped: list[str] = field(default_factory=list)
    """Tasks without a row, with the reason if it is not time."""
    crossover: list[dict[str, Any]] = field(default_factory=list)
    """Times of the Triton and the slab kernel for M around `wna16.MAX_ROWS`."""

    def wrong(self) -> list[str]:
        """The reasons of discarded configurations that are a bug, not a limit of the device."""
        return [reason for reason in self.discarded if reason.startswith((WRONG, UNSTABLE))]


def tasks(
    arch: str,
    dtypes: Sequence[str],
    groups: Sequence[int],
    sizes: Sequence[tuple[int, int]] = SIZES,
    bits: Sequence[int] = (4,),
) -> list[TuningTask]:
    """Decoding first, then batches of 16 and 64, then the rest; of each the first dtype, width and group first.

    A size whose K a group does not divide is left out for that group. Raises `LlmqError` if nothing is left.
    """
    known = buckets(arch)
    order = sorted(known, key=lambda size: ((known[0], 16, 64, 32, 128).index(size), size))
    listed = [
        TuningTask(dtype, group, size, n, k, width)
        for size in order
        for dtype in dtypes
        for width in bits
        for group in groups
        for k, n in sizes
        if group == 0 or (group > 0 and k % group == 0)
    ]
    if not listed:
        shapes = ", ".join(f"{k}x{n}" for k, n in sizes)
        raise LlmqError(f"groups must divide K, or be 0 (per channel); got {', '.join(map(str, groups))} for {shapes}")
    return listed


def candidates(device: Device, task: TuningTask) -> list[Launch]:
    """Every configuration to try for a task; that of the rules comes first."""
    rule = configure(device, task.dtype, task.group, task.rows, task.n, task.k, bits=task.bits)
    row_tiles, tiles, amd = -(-task.n // 64), -(-task.k // 128), device.arch.startswith("gfx")
    launches = {rule: None}
    for bn in (64, 128):
        for warps in (4, 8, 16) if amd else (4, 8):
            for stages in (2,) if amd else (3, 4, 5) if task.bits == 4 else (2, 3, 4):
                for split in SPLITS:
                    blocks = row_tiles * 64 // bn * split
                    crowded = split > 1 and blocks > MAX_BLOCKS * device.processors
                    if row_tiles % (bn // 64) == 0 and split <= tiles and not crowded:
                        launches[Launch(task.size, bn, warps, stages, split, form_of(device.arch, task.dtype))] = None
    return list(launches)


def sweep(
    listed: Sequence[TuningTask], device: torch.device, budget: Budget, seed: int, effort: Effort, results: Sweep,
    choices: Callable[[Device, TuningTask], list[Launch]] = candidates, done: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Measure tasks into `results`; a task that has a row already is skipped. done: called after each row."""
    have = {((r["dtype"], r["bits"], r["group"]), r["bucket"], r["n"], r["k"]) for r in results.rows}
    for task in listed:
        if (task.weights, task.size, task.n, task.k) in have:
            continue
        if budget.over():
            results.skipped.append(str(task))
            continue
        try:
            row = tune(task, choices(wna16.device_of(device), task), device, seed, effort, results.discarded, budget)
        except Exception as error:  # one task that does not fit into memory must not stop the others
            results.skipped.append(f"{task}: {type(error).__name__}: {error}")
            continue
        if row is None:
            results.skipped.append(f"{task}: no configuration gave a right result")
        else:
            results.rows.append(row)
            done()


def tune(
    task: TuningTask, launches: Sequence[Launch], device: torch.device, seed: int, effort: Effort,
    discarded: Counter[str], budget: Budget,
) -> dict[str, Any] | None:  # fmt: skip
    """The fastest configuration of a task with a right result, as a row of a table; None if there is none."""
    packed, x, expected = _inputs(task, device, seed, task.rows)
    tiled = wna16.prepare(packed)
    copies = copies_of(tiled, tiled.words.nbytes, device)
    timed: list[tuple[float, int, Launch]] = []
    for launch in launches:
        if budget.over() and timed:
            discarded["not reached in time"] += 1
            continue
        # Some configurations do not fit into shared memory or registers; the sweep finds out which.
        try:
            reason = _failure(x, tiled, launch, expected)
            if reason is None:
                calls = [partial(wna16.multiply, x, copy, None, launch) for copy in copies]
                timed.append((time_calls(calls, device, _quick(effort)).us, len(timed), launch))
        except Exception as error:
            reason = (
                f"{type(error).__name__}: {re.sub(r'[0-9]+', 'N', str(error).splitlines()[0] if str(error) else '')}"
            )
        if reason is not None:
            discarded[reason] += 1
    best = []
    for _, index, launch in sorted(timed)[:FINALISTS]:
        calls = [partial(wna16.multiply, x, copy, None, launch) for copy in copies]
        timing = time_calls(calls, device, effort)
        best.append((timing.us, index, launch, judge(timing.output, expected)))
    right = [one for one in best if one[3].wrong is None]
    if not right:
        return None
    us, _, launch, verdict = min(right, key=lambda one: one[:2])
    chosen = (launch.bn, launch.warps, launch.stages, launch.split)
    row = TunedLaunch(task.dtype, task.group, task.size, task.n, task.k, *chosen, task.bits)
    return asdict(row) | {"us": us, "m": task.rows, "error": verdict.error, "tried": len(timed)}


def _quick(effort: Effort) -> Effort:
    return QUICK if effort.samples > QUICK.samples else effort


def _inputs(task: TuningTask, device: torch.device, seed: int, rows: int) -> tuple[Packed, Tensor, Truth]:
    generator = torch.Generator(device).manual_seed(seed + task.size + task.k + 31 * task.n)
    dtype = getattr(torch, task.dtype)
    packed = draw(generator, task.n, task.k, task.group or task.k, True, dtype, task.bits)
    x = draw_input(generator, rows, task.k, dtype)
    return packed, x, truth(x, packed)


def _failure(x: Tensor, tiled: Tiled, launch: Launch, expected: Truth) -> str | None:
    y = wna16.multiply(x, tiled, None, launch)
    if judge(y, expected).wrong is not None:
        return WRONG
    return None if torch.equal(y, wna16.multiply(x, tiled, None, launch)) else UNSTABLE


def crossover(
    listed: Sequence[TuningTask], device: torch.device, budget: Budget, seed: int, effort: Effort, results: Sweep,
    rows: Sequence[int] = CROSSOVER_ROWS,
) -> None:  # fmt: skip
    """Times of the kernel, with the table so far, and of the slab kernel, for every M of `rows` and every shape of the tasks."""
    known, table = wna16.device_of(device), rows_of(results.rows)
    for task in {(t.weights, t.n, t.k): t for t in listed}.values():
        if budget.over():
            results.skipped.append(f"crossover {task}")
            continue
        packed, x, expected = _inputs(task, device, seed, max(rows))
        tiled, stored, times = wna16.prepare(packed), packed.weight.nbytes, []
        tiles, slabs = copies_of(tiled, stored, device), copies_of(packed, stored, device)
        for count in rows:
            if budget.over():
                break
            part = x[:count]
            launch = configure(known, task.dtype, task.group, count, task.n, task.k, table, task.bits)
            triton_calls = [partial(wna16.multiply, part, copy, None, launch) for copy in tiles]
            triton_time = time_calls(triton_calls, device, _quick(effort))
            slab_time = time_calls([partial(slab.run, part, copy) for copy in slabs], device, _quick(effort))
            for name, timing in (("triton", triton_time), ("slab", slab_time)):
                verdict = judge(timing.output, expected)
                if verdict.wrong is not None:
                    results.discarded[f"{WRONG}: {name} at M={count}"] += 1
            times.append({"m": count, "triton_us": triton_time.us, "slab_us": slab_time.us})
        most = max((t["m"] for t in times if t["triton_us"] <= t["slab_us"]), default=0)
        sizes = {"dtype": task.dtype, "bits": task.bits, "group": task.group, "n": task.n, "k": task.k}
        kept = [one for one in results.crossover if {name: one[name] for name in sizes} != sizes]
        new = sizes | {"triton_wins_up_to": most, "max_rows_now": wna16.MAX_ROWS, "times": times}
        results.crossover[:] = [*kept, new]


def load(path: Path, device: Device) -> Sweep:
    """The results of an earlier sweep on the same kind of device; empty if there are none."""
    if not path.exists():
        return Sweep()
    stored = json.loads(path.read_text())
    if (stored["arch"], stored["processors"]) != (device.arch, device.processors):
        return Sweep()
    return Sweep(stored["rows"], Counter(stored.get("discarded", {})), [], stored.get("crossover", []))


def save(path: Path, device: Device, about: dict[str, Any], results: Sweep) -> None:
    """Write a table for `launch.table_of`. about: the result of `record.about`."""
    table: dict[str, Any] = {"arch": device.arch, "processors": device.processors, **about}
    table |= {"rows": results.rows, "crossover": results.crossover}
    table |= {"discarded": dict(results.discarded), "skipped": results.skipped}
    write(path, table)


def compile_ahead(item: tuple[str, tuple[str, int, int], tuple[Launch, ...]]) -> int:
    """Launch each configuration once on a tiny weight, so that it is in Triton's cache: the work of one process.

    item: (device, `TuningTask.weights`, launches). Returns how many could be launched. The others fail again in `tune`, which
    counts them.
    """
    device, (dtype, bits, group), launches = item
    done = 0
    for launch in launches:
        k = max(launch.split * 128, group)
        generator = torch.Generator(torch.device(device)).manual_seed(1)
        torch_dtype = getattr(torch, dtype)
        tiled = wna16.prepare(draw(generator, 128, k, group or k, True, torch_dtype, bits))
        try:
            wna16.multiply(draw_input(generator, launch.bm, k, torch_dtype), tiled, None, launch)
            done += 1
        except Exception:  # `tune` reports it
            continue
    return done


def ahead(
    listed: Sequence[TuningTask], device: torch.device, parts: int
) -> Iterator[tuple[str, tuple[str, int, int], tuple[Launch, ...]]]:
    """The distinct configurations of tasks, in order, divided into items for `compile_ahead`."""
    known = wna16.device_of(device)
    distinct: dict[tuple[str, int, int], dict[Launch, None]] = {}
    for task in listed:
        distinct.setdefault(task.weights, {}).update(dict.fromkeys(candidates(known, task)))
    for weights, launches in distinct.items():
        for part in range(min(parts, len(launches))):
            yield str(device), weights, tuple(launches)[part::parts]
