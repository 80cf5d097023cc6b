"""What the commands print: tables and progress on the terminal, one JSON line last. No arithmetic beyond formatting.

Tables and next steps go to stdout, progress (of a quantization: `llmq.cli.progress`) and errors to stderr.
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
from llmq.names import compact_names, first_names

if TYPE_CHECKING:
    from llmq.eval.latency import Latency
    from llmq.eval.perplexity import Perplexity
    from llmq.quantization.rounding import LinearReport
    from llmq.quantization.sizing import Preview
    from llmq.report import Report
    from llmq.transforms.base import PairReport


LOG_WIDTH = 140  # where output goes to a file, and no terminal says how wide it is


def make_console(quiet: bool) -> Console:
    """A console on stdout; silent when `quiet`."""
    width = None if sys.stdout.isatty() else LOG_WIDTH
    return Console(quiet=quiet, highlight=False, soft_wrap=False, width=width)


def print_json(value: object) -> None:
    """One line of JSON on stdout: the last line of every command."""
    sys.stdout.flush()
    print(json.dumps(value), flush=True)


def size(count: float | None) -> str:
    """Bytes in words, decimal units: 1.23 GB."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


@contextmanager
def window_progress(quiet: bool, label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over evaluation windows while open; silent when `quiet` or not on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_report(console: Console, report: Report) -> None:
    """The layer table and totals of a quantization, then the commands to run next."""
    calibrated = report.calibration is not None
    what = "output error" if calibrated else "weight error"
    table = Table(
        title=Text(f"{report.source}: {report.config.method}, {what} beside RTN's (share of the output's energy)")
    )
    for heading in ("linear", what, "RTN", "ratio", "end codes", "clipped", "group", "s"):
        table.add_column(heading, justify="left" if heading == "linear" else "right", no_wrap=True)
    for name, rows in _by_kind(report.layers).items():
        table.add_row(Text(name), *_averages(rows))
    console.print(table)
    if report.calibration:
        told = report.calibration
        text = "its own writing" if told["dataset"] == SELF else told["dataset"]
        console.print(f"calibrated on {told['windows']} windows of {told['seq_len']} tokens of {text}")
    _print_pairs(console, report)
    for note in (*report.notes, *_shortened(_gathered(report.fallbacks))):
        console.print(f"note: {note}", markup=False)
    console.print(
        f"{len(report.layers)} linears at {report.bits_per_weight:.3f} bits per weight, "
        f"{size(report.checkpoint_bytes)} on disk, {report.seconds:.1f} s, peak memory {size(report.peak_rss_bytes)}"
    )
    console.print(f"every layer: {report.output}/llmq_report.json\nnext:", markup=False)
    for command in (
        f"llmq evaluate {report.output}",
        f'llmq generate {report.output} --prompt "Why is the sky blue?"',
        f"vllm serve {report.output}",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)


def _print_pairs(console: Console, report: Report) -> None:
    """How many groups of linears got a scale, by kind, and why the others did not."""
    kinds: dict[str, list[PairReport]] = {}
    for pair in report.pairs:
        what = " ".join(name.rpartition(".")[2] for name in pair.consumers)
        fed = "" if pair.producer is None else f"{pair.producer.rpartition('.')[2]} -> "
        kinds.setdefault(fed + what, []).append(pair)
    for kind, pairs in kinds.items():
        scaled = [pair.held_out_ratio for pair in pairs if pair.note is None and pair.held_out_ratio is not None]
        gain = f", error on held-out windows x {sum(scaled) / len(scaled):.2f}" if scaled else ""
        reasons = Counter(pair.note for pair in pairs if pair.note)
        why = "".join(f"; {count} not: {reason}" for reason, count in reasons.items())
        console.print(f"scaled: {kind}: {len(scaled)} of {len(pairs)}{gain}{why}", markup=False)


def _by_kind(layers: Sequence[LinearReport]) -> dict[str, list[LinearReport]]:
    """Layers under their name with the block's number taken out: one row a kind, and the worst layer last."""
    kinds: dict[str, list[LinearReport]] = {}
    for row in layers:
        parts = row.name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        kinds.setdefault(".".join(parts[index + 1 :]), []).append(row)
    named = {f"{name} (mean of {len(rows)})": rows for name, rows in kinds.items()}
    worst = max(layers, key=lambda row: row.error)
    return {**named, f"worst: {worst.name}": [worst]}


def _averages(rows: Sequence[LinearReport]) -> list[str]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    error, baseline = mean([r.error for r in rows]), mean([r.rtn_error for r in rows])
    groups = sorted({str(r.group_size or "channel") for r in rows})
    return [
        f"{error:.5f}",
        f"{baseline:.5f}",
        f"{error / baseline:.2f}" if baseline else "-",
        f"{mean([r.saturated for r in rows]):.1%}",
        f"{mean([r.clipped for r in rows]):.1%}",
        "/".join(groups),
        f"{sum(r.seconds for r in rows):.1f}",
    ]


def _gathered(lines: Sequence[str]) -> list[str]:
    """`LINEAR: what happened` lines with one line for all linears that the same happened to."""
    owners: dict[str, list[str]] = {}
    for line in lines:
        name, _, what = line.partition(": ")
        owners.setdefault(what, []).append(name)
    return [f"{first_names(compact_names(names))}: {what}" for what, names in owners.items()]


def _shortened(lines: Sequence[str], most: int = 6) -> list[str]:
    return (
        [*lines[:most], f"... and {len(lines) - most} more in llmq_report.json"] if len(lines) > most else list(lines)
    )


def print_preview(console: Console, preview: Preview) -> None:
    """Every tensor before and after, the totals, and the predicted peak memory by part."""
    table = Table(title="what would be written")
    for heading in ("tensor", "shape", "before", "after", "as"):
        table.add_column(heading, justify="left" if heading in ("tensor", "as") else "right", no_wrap=True)
    for row in preview.rows:
        shape = " x ".join(map(str, row.shape))
        table.add_row(Text(row.name), shape, size(row.before), size(row.after), row.becomes)
    console.print(table)
    for note in _gathered(preview.notes):
        console.print(f"note: {note}", markup=False)
    share = preview.after / preview.before
    console.print(f"{size(preview.before)} becomes {size(preview.after)} ({share:.0%})")
    parts = ", ".join(f"{name} {size(count)}" for name, count in preview.memory.items() if count)
    console.print(f"predicted peak memory {size(preview.peak)}: {parts}")


def print_perplexities(console: Console, results: Sequence[tuple[str, Perplexity, dict[str, Any]]]) -> None:
    """One row a model, with the difference to the first and its standard error over the same windows."""
    from llmq.eval.perplexity import comparable, paired_difference

    first = results[0][1]
    _, _, told = results[0]
    table = Table(
        title=Text(f"perplexity on {told['dataset']}, {first.windows} windows of {first.window}, {told['dtype']}")
    )
    apart = ("KL", "± s.e.", "same top-1") if "kl" in told else ()
    for heading in ("model", "perplexity", "± s.e.", "to the first", "± s.e.", "bits/byte", *apart, "s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, result, values in results:
        cells = ["", ""]
        if result is not first and comparable(first, result):
            difference, error = paired_difference(first, result)
            cells = [f"{difference:+.3f}", _decimals(error)]
        cells.append(f"{result.bits_per_byte:.4f}" if result.bits_per_byte else "-")
        if apart:
            cells += [f"{values['kl']:.4f}", _decimals(values["kl_stderr"], 4), f"{values['top1']:.1%}"]
        row = (f"{result.value:.3f}", _decimals(result.stderr), *cells, f"{result.seconds:.1f}")
        table.add_row(Text(name), *row)
    console.print(table)
    if not all(comparable(first, result) for _, result, _ in results):
        console.print("note: not all were measured on the same tokens: compare bits/byte, not perplexity")
    for note in dict.fromkeys(note for _, result, _ in results for note in result.notes):
        console.print(f"note: {note}", markup=False)


def print_speeds(console: Console, names: Sequence[str], speeds: Sequence[Latency], dtype: str) -> None:
    """Tokens per second of each model, and the ratio to the first."""
    first = speeds[0]
    where = first.device if first.device != "cpu" else f"cpu, {first.threads} threads"
    table = Table(
        title=f"tokens/s on {where}, {dtype}: prompt of {first.prompt_tokens}, then {first.new_tokens} by one"
    )
    for heading in ("model", "prefill", "to the first", "decode", "to the first", "weights"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, found in zip(names, speeds, strict=True):
        cells = []
        for mine, base in (
            (found.prefill_tokens_per_second, first.prefill_tokens_per_second),
            (found.decode_tokens_per_second, first.decode_tokens_per_second),
        ):
            cells += [f"{mine:.1f}", "" if found is first else f"{mine / base:.2f}x"]
        table.add_row(Text(name), *cells, size(found.weight_bytes))
    console.print(table)


def _decimals(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:.{places}f}"
