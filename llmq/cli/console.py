"""What the commands print: tables and notes on the terminal, one line of JSON last.

Tables and next steps go to stdout; progress (of a quantization: `llmq.cli.progress`) and errors go to stderr.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llmq.config import SELF
from llmq.memory import format_bytes
from llmq.names import compact_names, first_names

if TYPE_CHECKING:
    from llmq.eval.base import Metric
    from llmq.evaluation import Evaluation
    from llmq.quantization.rounding import LinearReport
    from llmq.quantization.sizing import Preview
    from llmq.report import Report
    from llmq.transforms.base import PairReport

LOG_WIDTH = 140  # columns, if stdout is not a terminal
MAX_NOTES = 6


def make_console(quiet: bool) -> Console:
    """A console on stdout; silent if `quiet`."""
    width = None if sys.stdout.isatty() else LOG_WIDTH
    return Console(quiet=quiet, highlight=False, soft_wrap=False, width=width)


def print_json(value: object) -> None:
    """One line of JSON on stdout: the last line of every command."""
    sys.stdout.flush()
    print(json.dumps(value), flush=True)


@contextmanager
def window_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar over the windows of each model: call with (model, windows done, windows in total).

    Silent if `quiet` or if stderr is not a terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def _table(title: str, headings: Sequence[str], left: Sequence[str], no_wrap: bool = False) -> Table:
    """An empty table; the columns named in `left` are aligned to the left, numbers to the right."""
    table = Table(title=Text(title))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=no_wrap)
    return table


def print_report(console: Console, report: Report) -> None:
    """The layer table and totals of a quantization, then the commands to run next."""
    error = "weight error" if report.calibration is None else "output error"
    energy = "weight" if report.calibration is None else "output"
    table = _table(
        f"{report.source}: {report.config.method}, squared error relative to the {energy}'s energy",
        ("linear", error, "RTN error", "vs. RTN", "extreme codes", "clipped", "group size", "seconds"),
        left=("linear",),
        no_wrap=True,
    )
    for name, rows in _by_kind(report.layers).items():
        table.add_row(Text(name), *_averages(rows))
    console.print(table)
    if report.calibration:
        used = report.calibration
        text = "text that the model generated" if used.dataset == SELF else used.dataset
        console.print(f"calibration: {used.windows} windows of {used.seq_len} tokens of {text}", markup=False)
    _print_pairs(console, report.pairs)
    _print_notes(console, (*report.notes, *_first_notes(_by_text(report.fallbacks))))
    console.print(
        f"{len(report.layers)} linears at {report.bits_per_weight:.3f} bits per weight, "
        f"{format_bytes(report.checkpoint_bytes)} on disk, {report.seconds:.1f} s, "
        f"peak memory {format_bytes(report.peak_rss_bytes)}"
    )
    console.print(f"all layers: {report.output}/llmq_report.json\nnext:", markup=False)
    for command in (
        f"llmq evaluate {report.output}",
        f'llmq generate {report.output} --prompt "Why is the sky blue?"',
        f"vllm serve {report.output}",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)


def _print_pairs(console: Console, pairs: Sequence[PairReport]) -> None:
    """For each kind of input group: how many were rescaled, the gain, and why the others were not."""
    kinds: dict[str, list[PairReport]] = {}
    for pair in pairs:
        consumers = " ".join(name.rpartition(".")[2] for name in pair.consumers)
        producer = "" if pair.producer is None else f"{pair.producer.rpartition('.')[2]} -> "
        kinds.setdefault(producer + consumers, []).append(pair)
    for kind, rows in kinds.items():
        scaled = [row for row in rows if row.note is None]
        ratios = [row.held_out_ratio for row in scaled if row.held_out_ratio is not None]
        gain = f", held-out error multiplied by {_mean(ratios):.2f}" if ratios else ""
        reasons = Counter(row.note for row in rows if row.note)
        others = "".join(f"; {count} not rescaled: {reason}" for reason, count in reasons.items())
        console.print(f"rescaled: {kind}: {len(scaled)} of {len(rows)}{gain}{others}", markup=False)


def _by_kind(layers: Sequence[LinearReport]) -> dict[str, list[LinearReport]]:
    """Layers by their name without the block's index, one table row each; and last the layer with the largest error."""
    kinds: dict[str, list[LinearReport]] = {}
    for row in layers:
        parts = row.name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        kinds.setdefault(".".join(parts[index + 1 :]), []).append(row)
    named = {f"{name} (mean of {len(rows)})": rows for name, rows in kinds.items()}
    worst = max(layers, key=lambda row: row.error)
    return {**named, f"worst: {worst.name}": [worst]}


def _averages(rows: Sequence[LinearReport]) -> list[str]:
    error, baseline = _mean([row.error for row in rows]), _mean([row.rtn_error for row in rows])
    groups = sorted({str(row.group_size or "channel") for row in rows})
    return [
        f"{error:.5f}",
        f"{baseline:.5f}",
        f"{error / baseline:.2f}" if baseline else "-",
        f"{_mean([row.saturated for row in rows]):.1%}",
        f"{_mean([row.clipped for row in rows]):.1%}",
        "/".join(groups),
        f"{sum(row.seconds for row in rows):.1f}",
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by_text(lines: Sequence[str]) -> list[str]:
    """`LINEAR: what happened` lines, with all linears to which the same happened on one line."""
    names_by_text: dict[str, list[str]] = {}
    for line in lines:
        name, _, text = line.partition(": ")
        names_by_text.setdefault(text, []).append(name)
    return [f"{first_names(compact_names(names))}: {text}" for text, names in names_by_text.items()]


def _first_notes(notes: Sequence[str]) -> list[str]:
    rest = len(notes) - MAX_NOTES
    return [*notes[:MAX_NOTES], *([f"... and {rest} more in llmq_report.json"] if rest > 0 else [])]


def _print_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", markup=False)


def print_preview(console: Console, preview: Preview) -> None:
    """Every tensor before and after, the totals, and the predicted peak memory by part."""
    table = _table(
        "dry run: nothing is written",
        ("tensor", "shape", "before", "after", "stored as"),
        left=("tensor", "stored as"),
        no_wrap=True,
    )
    for row in preview.rows:
        shape = " x ".join(map(str, row.shape))
        table.add_row(Text(row.name), shape, format_bytes(row.before), format_bytes(row.after), row.becomes)
    console.print(table)
    _print_notes(console, _by_text(preview.notes))
    share = preview.after / preview.before
    console.print(f"checkpoint: {format_bytes(preview.before)} -> {format_bytes(preview.after)} ({share:.0%})")
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in preview.memory.items() if count)
    console.print(f"predicted peak memory: {format_bytes(preview.peak)} ({parts})")


def print_evaluations(console: Console, evaluations: Sequence[Evaluation]) -> None:
    """One table for all text metrics and one per metric of models alone, a row per model; then the notes."""
    from llmq.eval import registry
    from llmq.eval.base import ModelMetric, TextMetric

    first = evaluations[0]
    computed = [metric for metric in registry.METRICS if metric.name in first.results]
    text_metrics = [metric for metric in computed if isinstance(metric, TextMetric)]
    result = first.results[text_metrics[0].name]
    title = f"{first.dataset}: {result.windows} windows of {result.window} tokens, {first.dtype}"
    _print_metrics(console, title, text_metrics, evaluations, seconds=True)
    for metric in computed:
        if isinstance(metric, ModelMetric):
            _print_metrics(console, metric.title(first.results[metric.name]), [metric], evaluations)
    for metric in computed:
        _print_notes(console, metric.notes([evaluation.results[metric.name] for evaluation in evaluations]))


def _print_metrics(
    console: Console,
    title: str,
    metrics: Sequence[Metric[Any]],
    evaluations: Sequence[Evaluation],
    seconds: bool = False,
) -> None:
    columns = [(metric.name, column) for metric in metrics for column in metric.columns]
    headings = ["model", *(column.heading for _, column in columns), *(["seconds"] if seconds else [])]
    table = _table(title, headings, left=("model",))
    first = evaluations[0]
    for evaluation in evaluations:
        cells = [column.cell(evaluation.results[name], first.results[name]) for name, column in columns]
        table.add_row(Text(evaluation.model), *cells, *([f"{evaluation.seconds:.1f}"] if seconds else []))
    console.print(table)
