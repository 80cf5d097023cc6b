"""Progress of a quantization on stderr: a live bar on a terminal, else one plain line per block for log files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmq.calibration import GenerationProgress
from llmq.memory import format_bytes, peak_rss_bytes
from llmq.quantization.pipeline import Step


@contextmanager
def block_progress(quiet: bool) -> Iterator[Callable[[Step | GenerationProgress], None]]:
    """Shows the block, the linear, the time left and the peak memory; silent if `quiet`.

    Before the first block, if the model generates its own calibration text, it shows how far that is.
    """
    if quiet:
        yield lambda step: None
    elif not sys.stderr.isatty():
        yield _as_lines(lambda line: print(line, file=sys.stderr, flush=True))
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


def _as_lines(print_line: Callable[[str], None]) -> Callable[[Step | GenerationProgress], None]:
    """One line per block; of the text generation, its estimated time and then a line per tenth."""
    started = time.perf_counter()
    generating = _generation_lines(print_line)

    def show(step: Step | GenerationProgress) -> None:
        nonlocal started
        if isinstance(step, GenerationProgress):
            generating(step)
            started = time.perf_counter()
        elif step.linear is None:
            passed = time.perf_counter() - started
            left = f", {passed / step.block * (step.blocks - step.block):.0f} s left" if step.block else ""
            memory = format_bytes(peak_rss_bytes())
            print_line(f"block {step.block + 1}/{step.blocks}: {passed:.0f} s{left}, peak memory {memory}")

    return show


def _on_bar(bar: Progress) -> Callable[[Step | GenerationProgress], None]:
    """One bar: for the text generation, whose estimated time is printed above it, then for the blocks."""
    task = bar.add_task("reading", total=None, memory="", unit="block")
    generating = _generation_lines(lambda line: bar.console.print(line, highlight=False), every_tenth=False)

    def show(step: Step | GenerationProgress) -> None:
        memory = format_bytes(peak_rss_bytes())
        if isinstance(step, GenerationProgress):
            generating(step)
            bar.update(
                task, total=step.total, completed=step.done, description="generating", unit="token", memory=memory
            )
        else:
            name = step.linear or "observing"
            bar.update(task, total=step.blocks, completed=step.block, description=name, unit="block", memory=memory)

    return show


def _generation_lines(
    print_line: Callable[[str], None], every_tenth: bool = True
) -> Callable[[GenerationProgress], None]:
    """Prints the size of the text to generate, the estimated time once it is known, and a line per tenth if `every_tenth`."""
    last: int | None = None  # -1: the size was printed; from 0 on: tenths of the text

    def show(step: GenerationProgress) -> None:
        nonlocal last
        tenth = -1 if step.left is None else 10 * step.done // step.total
        if last is not None and (tenth <= last or not (every_tenth or last < 0)):
            return
        last = tenth
        if step.left is None:
            print_line(f"generating {step.total} calibration tokens with the model; estimating the time")
        else:
            print_line(f"generated {step.done} of {step.total} calibration tokens, about {step.left:.0f} s left")

    return show
