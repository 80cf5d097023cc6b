"""Sweep the configurations of the Triton kernel on the device at hand, and write what `llmq.kernels.launch` reads.

    for each task (dtype, group, bucket, N, K), the most important first:
        every BN x warps x stages x split that fits: multiply, judge against float64, again with the same bits, a quick time
        the three fastest once more, with all samples: the fastest of them is the row

A configuration that does not compile or launch, or whose result is wrong, is discarded and counted with its reason. A bucket is
measured at its largest M, the one of 8 at M = 1, where decoding is. Tables hold symmetric weights' times: zero points cost
a load more and change no choice of the rules.

A sweep that is ended by its time box leaves a valid table of what was reached, and a later one with the same file goes on
where it ended. `crossover` holds, as information, the times of the kernel and of the slab path for M around `wna16.MOST_ROWS`.
Left out: tuning at run time, and forms of unpacking other than by vendor.
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

from llmq.bench.kernels.timing import QUICK, Budget, Effort, copies_of, measure
from llmq.bench.kernels.truth import Truth, draw, draw_input, judge, truth
from llmq.bench.record import write
from llmq.errors import LlmqError
from llmq.kernels import slab, wna16
from llmq.kernels.launch import Device, Launch, Row, buckets, configure, form_of, rows_of
from llmq.kernels.layout import Tiled
from llmq.kernels.problem import Packed

SIZES = ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672), (14336, 4096))  # K, N
SPLITS = (1, 2, 4, 8, 16)
MOST_BLOCKS = 16  # for each processor: beyond it more parts of K cannot help
FINALISTS = 3
WRONG = "wrong result"
UNSTABLE = "other bits the second time"
CROSSOVER_ROWS = (64, 128, 192, 256, 384, 512, 1024)


@dataclass(frozen=True)
class Task:
    """One row of a table to be found. group: columns per scale, 0 per channel. size: the bucket."""

    dtype: str
    group: int
    size: int
    n: int
    k: int
    bits: int = 4

    @property
    def weights(self) -> tuple[str, int, int]:
        """What weights have in common that one compiled kernel takes: dtype of scales and x, bits, group."""
        return self.dtype, self.bits, self.group

    @property
    def rows(self) -> int:
        """The M at which it is measured."""
        return 1 if self.size == 8 else self.size


@dataclass
class Sweep:
    """What a sweep found: rows as a table holds them, discarded configurations by reason, what has no row, crossovers."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    discarded: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    crossover: list[dict[str, Any]] = field(default_factory=list)

    def wrong(self) -> list[str]:
        """The reasons among the discarded that mean a bug, not a limit of the device."""
        return [reason for reason in self.discarded if reason.startswith((WRONG, UNSTABLE))]


def tasks(
    arch: str,
    dtypes: Sequence[str],
    groups: Sequence[int],
    sizes: Sequence[tuple[int, int]] = SIZES,
    bits: Sequence[int] = (4,),
) -> list[Task]:
    """Decoding alone first, then batches of 16 and 64, then the rest; of each the first dtype, width and group first.

    Sizes whose K a group does not divide are left out for it; `LlmqError` where that leaves nothing.
    """
    known = buckets(arch)
    order = sorted(known, key=lambda size: ((known[0], 16, 64, 32, 128).index(size), size))
    found = [
        Task(dtype, group, size, n, k, width)
        for size in order
        for dtype in dtypes
        for width in bits
        for group in groups
        for k, n in sizes
        if group == 0 or (group > 0 and k % group == 0)
    ]
    if not found:
        shapes = ", ".join(f"{k}x{n}" for k, n in sizes)
        raise LlmqError(f"groups must divide K, or be 0 (per channel); got {', '.join(map(str, groups))} for {shapes}")
    return found


def candidates(device: Device, task: Task) -> list[Launch]:
    """Every configuration to try for a task, that of the rules among them."""
    rule = configure(device, task.dtype, task.group, task.rows, task.n, task.k, bits=task.bits)
    row_tiles, tiles, amd = -(-task.n // 64), -(-task.k // 128), device.arch.startswith("gfx")
    found = {rule: None}
    for bn in (64, 128):
        for warps in (4, 8, 16) if amd else (4, 8):
            for stages in (2,) if amd else (3, 4, 5) if task.bits == 4 else (2, 3, 4):
                for split in SPLITS:
                    blocks = row_tiles * 64 // bn * split
                    crowded = split > 1 and blocks > MOST_BLOCKS * device.processors
                    if row_tiles % (bn // 64) == 0 and split <= tiles and not crowded:
                        found[Launch(task.size, bn, warps, stages, split, form_of(device.arch, task.dtype))] = None
    return list(found)


def sweep(
    listed: Sequence[Task], device: torch.device, budget: Budget, seed: int, effort: Effort, found: Sweep,
    choices: Callable[[Device, Task], list[Launch]] = candidates, done: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Find rows for tasks, into `found`; tasks that it has a row for are passed over. done: is called after each row."""
    have = {((r["dtype"], r["bits"], r["group"]), r["bucket"], r["n"], r["k"]) for r in found.rows}
    for task in listed:
        if (task.weights, task.size, task.n, task.k) in have:
            continue
        if budget.over():
            found.skipped.append(str(task))
            continue
        try:
            row = tune(task, choices(wna16.device_of(device), task), device, seed, effort, found.discarded, budget)
        except Exception as error:  # one task that does not fit into memory must not cost the others
            found.skipped.append(f"{task}: {type(error).__name__}: {error}")
            continue
        if row is None:
            found.skipped.append(f"{task}: no configuration was right")
        else:
            found.rows.append(row)
            done()


def tune(
    task: Task, launches: Sequence[Launch], device: torch.device, seed: int, effort: Effort,
    discarded: Counter[str], budget: Budget,
) -> dict[str, Any] | None:  # fmt: skip
    """The fastest right configuration of a task as a table's row; None where there is none."""
    packed, x, wanted = _inputs(task, device, seed, task.rows)
    tiled = wna16.prepare(packed)
    copies = copies_of(tiled, tiled.words.nbytes, device)
    timed: list[tuple[float, int, Launch]] = []
    for launch in launches:
        if budget.over() and timed:
            discarded["not reached in time"] += 1
            continue
        # Some do not fit into shared memory or registers: that is what is to be found out.
        try:
            reason = _refused(x, tiled, launch, wanted)
            if reason is None:
                calls = [partial(wna16.multiply, x, copy, None, launch) for copy in copies]
                timed.append((measure(calls, device, _quick(effort)).us, len(timed), launch))
        except Exception as error:
            reason = (
                f"{type(error).__name__}: {re.sub(r'[0-9]+', 'N', str(error).splitlines()[0] if str(error) else '')}"
            )
        if reason is not None:
            discarded[reason] += 1
    best = []
    for _, index, launch in sorted(timed)[:FINALISTS]:
        timing = measure([partial(wna16.multiply, x, copy, None, launch) for copy in copies], device, effort)
        best.append((timing.us, index, launch, judge(timing.output, wanted)))
    right = [one for one in best if one[3].wrong is None]
    if not right:
        return None
    us, _, launch, verdict = min(right, key=lambda one: one[:2])
    chosen = (launch.bn, launch.warps, launch.stages, launch.split)
    row = Row(task.dtype, task.group, task.size, task.n, task.k, *chosen, task.bits)
    return asdict(row) | {"us": us, "m": task.rows, "error": verdict.error, "tried": len(timed)}


def _quick(effort: Effort) -> Effort:
    return QUICK if effort.samples > QUICK.samples else effort


def _inputs(task: Task, device: torch.device, seed: int, rows: int) -> tuple[Packed, Tensor, Truth]:
    generator = torch.Generator(device).manual_seed(seed + task.size + task.k + 31 * task.n)
    dtype = getattr(torch, task.dtype)
    packed = draw(generator, task.n, task.k, task.group or task.k, True, dtype, task.bits)
    x = draw_input(generator, rows, task.k, dtype)
    return packed, x, truth(x, packed)


def _refused(x: Tensor, tiled: Tiled, launch: Launch, wanted: Truth) -> str | None:
    y = wna16.multiply(x, tiled, None, launch)
    if judge(y, wanted).wrong is not None:
        return WRONG
    return None if torch.equal(y, wna16.multiply(x, tiled, None, launch)) else UNSTABLE


def crossover(
    listed: Sequence[Task], device: torch.device, budget: Budget, seed: int, effort: Effort, found: Sweep,
    rows: Sequence[int] = CROSSOVER_ROWS,
) -> None:  # fmt: skip
    """Times of the kernel, with the table found so far, and of the slab path, for every M of `rows` and every shape of tasks."""
    known, table = wna16.device_of(device), rows_of(found.rows)
    for task in {(t.weights, t.n, t.k): t for t in listed}.values():
        if budget.over():
            found.skipped.append(f"crossover {task}")
            continue
        packed, x, wanted = _inputs(task, device, seed, max(rows))
        tiled, stored, times = wna16.prepare(packed), packed.weight.nbytes, []
        tiles, slabs = copies_of(tiled, stored, device), copies_of(packed, stored, device)
        for count in rows:
            if budget.over():
                break
            part = x[:count]
            launch = configure(known, task.dtype, task.group, count, task.n, task.k, table, task.bits)
            one = measure([partial(wna16.multiply, part, copy, None, launch) for copy in tiles], device, _quick(effort))
            two = measure([partial(slab.run, part, copy) for copy in slabs], device, _quick(effort))
            for name, timing in (("triton", one), ("slab", two)):
                verdict = judge(timing.output, wanted)
                if verdict.wrong is not None:
                    found.discarded[f"{WRONG}: {name} at M={count}"] += 1
            times.append({"m": count, "triton_us": one.us, "slab_us": two.us})
        most = max((t["m"] for t in times if t["triton_us"] <= t["slab_us"]), default=0)
        sizes = {"dtype": task.dtype, "bits": task.bits, "group": task.group, "n": task.n, "k": task.k}
        kept = [one for one in found.crossover if {name: one[name] for name in sizes} != sizes]
        new = sizes | {"triton_wins_up_to": most, "most_rows_now": wna16.MOST_ROWS, "times": times}
        found.crossover[:] = [*kept, new]


def load(path: Path, device: Device) -> Sweep:
    """What an earlier sweep of the same kind of device left; nothing where there is none."""
    if not path.exists():
        return Sweep()
    stored = json.loads(path.read_text())
    if (stored["arch"], stored["processors"]) != (device.arch, device.processors):
        return Sweep()
    return Sweep(stored["rows"], Counter(stored.get("discarded", {})), [], stored.get("crossover", []))


def save(path: Path, device: Device, about: dict[str, Any], found: Sweep) -> None:
    """Write a table that `launch.table_of` reads. about: what `record.about` tells."""
    table: dict[str, Any] = {"arch": device.arch, "processors": device.processors, **about}
    table |= {"rows": found.rows, "crossover": found.crossover}
    table |= {"discarded": dict(found.discarded), "skipped": found.skipped}
    write(path, table)


def compile_ahead(item: tuple[str, tuple[str, int, int], tuple[Launch, ...]]) -> int:
    """Launch configurations once each on a tiny weight, so that Triton's cache has them: the work of one process.

    item: device, `Task.weights`, launches. How many could be launched. The rest fails again where it is counted.
    """
    device, (dtype, bits, group), launches = item
    done = 0
    for launch in launches:
        k = max(launch.split * 128, group)
        generator = torch.Generator(torch.device(device)).manual_seed(1)
        kind = getattr(torch, dtype)
        tiled = wna16.prepare(draw(generator, 128, k, group or k, True, kind, bits))
        try:
            wna16.multiply(draw_input(generator, launch.bm, k, kind), tiled, None, launch)
            done += 1
        except Exception:  # told by `tune`
            continue
    return done


def ahead(
    listed: Sequence[Task], device: torch.device, parts: int
) -> Iterator[tuple[str, tuple[str, int, int], tuple[Launch, ...]]]:
    """The distinct configurations of tasks, in order, dealt into items for `compile_ahead`."""
    known = wna16.device_of(device)
    wanted: dict[tuple[str, int, int], dict[Launch, None]] = {}
    for task in listed:
        wanted.setdefault(task.weights, {}).update(dict.fromkeys(candidates(known, task)))
    for weights, launches in wanted.items():
        for part in range(min(parts, len(launches))):
            yield str(device), weights, tuple(launches)[part::parts]
