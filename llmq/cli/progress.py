"""Where a quantization stands, on stderr: a live bar on a terminal; elsewhere a plain line a block, for log files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmq.calibration import GenerationProgress
from llmq.cli.console import size
from llmq.memory import peak_rss_bytes
from llmq.quantization.pipeline import Step


@contextmanager
def block_progress(quiet: bool) -> Iterator[Callable[[Step | GenerationProgress], None]]:
    """Shows block i/N, the linear, the time left and the memory while open; before that, what the model writes itself."""
    if quiet:
        yield lambda step: None
    elif not sys.stderr.isatty():
        yield _by_lines(lambda line: print(line, file=sys.stderr, flush=True))
    else:
        columns = (
            TextColumn("{task.fields[unit]}"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _on_bar(bar)


def _by_lines(tell: Callable[[str], None]) -> Callable[[Step | GenerationProgress], None]:
    """A line a block, and some of the writing: what it will cost, then every tenth."""
    began = time.perf_counter()
    costs = _costs(tell)

    def line(step: Step | GenerationProgress) -> None:
        nonlocal began
        if isinstance(step, GenerationProgress):
            costs(step)
            began = time.perf_counter()
        elif step.linear is None:
            passed = time.perf_counter() - began
            left = f", {passed / step.block * (step.blocks - step.block):.0f} s left" if step.block else ""
            tell(f"block {step.block + 1}/{step.blocks}: {passed:.0f} s{left}, {size(peak_rss_bytes())}")

    return line


def _on_bar(bar: Progress) -> Callable[[Step | GenerationProgress], None]:
    """One bar: the writing, whose cost is a line of its own, then the blocks."""
    task = bar.add_task("reading", total=None, memory="", unit="block")
    costs = _costs(lambda line: bar.console.print(line, highlight=False), tenths=False)

    def update(step: Step | GenerationProgress) -> None:
        memory = size(peak_rss_bytes())
        if isinstance(step, GenerationProgress):
            costs(step)
            bar.update(task, total=step.total, completed=step.done, description="writing", unit="token", memory=memory)
        else:
            name = step.linear or "observing"
            bar.update(task, total=step.blocks, completed=step.block, description=name, unit="block", memory=memory)

    return update


def _costs(tell: Callable[[str], None], tenths: bool = True) -> Callable[[GenerationProgress], None]:
    """Tells what the writing will cost as soon as that is known, and every tenth of it after."""
    told: list[int] = []  # -1: how much there is to write; from 0 on: tenths

    def cost(step: GenerationProgress) -> None:
        tenth = -1 if step.left is None else 10 * step.done // step.total
        if told and (tenth <= told[-1] or not (tenths or told[-1] < 0)):
            return
        told.append(tenth)
        if step.left is None:
            tell(f"the model writes {step.total} calibration tokens first; timing it")
        else:
            tell(f"wrote {step.done} of {step.total} calibration tokens, about {step.left:.0f} s left")

    return cost
