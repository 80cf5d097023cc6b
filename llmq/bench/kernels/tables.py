"""Records as tables on a terminal, and the parser of shapes. The tables show what the JSON holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llmq.bench.kernels.contenders import Shape
from llmq.errors import LlmqError

WIDTH = 170  # columns, if the output is a pipe


def parse_shapes(typed: Sequence[str]) -> tuple[Shape, ...]:
    """4096x14336 -> K 4096, N 14336."""
    shapes = []
    for text in typed:
        sizes = re.fullmatch(r"(\d+)x(\d+)", text)
        if sizes is None or not all(int(size) for size in sizes.groups()):
            raise LlmqError(f"a shape must be KxN, two positive numbers such as 4096x14336; got {text!r}")
        shapes.append(Shape(int(sizes[1]), int(sizes[2])))
    return tuple(shapes)


def show_bench(record: dict[str, Any]) -> None:
    """A table per shape: microseconds, speed-up over dense, share of the roofline; then absent, wrong and skipped contenders."""
    console = _console()
    limits, zeros = record["ceilings"], "sym" if record["symmetric"] else "asym"
    what = f"{record['device']}, {record['dtype']}, int{record['bits']} g{record['group'] or 'channel'} {zeros}"
    if record["self_test"]:
        console.print("SELF-TEST on the CPU: nothing below is a measurement")
    for shape in dict.fromkeys(row["shape"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["shape"] == shape]
        table = Table(
            title=f"K x N {shape} {rows[0]['layer']} | {what} | us, over dense, share of roofline; >: run by llmq"
        )
        names = list(dict.fromkeys(row["what"] for row in rows))
        for name in ("M", *names):
            table.add_column(name, justify="right")
        for m in sorted({row["m"] for row in rows}):
            at = {row["what"]: _cell(row) for row in rows if row["m"] == m}
            table.add_row(str(m), *(at.get(name, "") for name in names))
        console.print(table)
    copied, computed = limits["copy_bytes_per_s"] / 1e12, limits["matmul_flops_per_s"] / 1e12
    console.print(f"ceilings: copy {copied:.4g} TB/s, dense matmul {computed:.4g} TFLOP/s", highlight=False)
    for name, reason in record["absent"].items():
        console.print(f"not measured: {name}: {reason}", highlight=False)
    _failures(console, record["wrong"], record["skipped"])


def _cell(row: dict[str, Any]) -> str:
    gain = "" if row["speedup"] is None else f" {row['speedup']:5.2f}x"
    return f"{'>' if row['preferred'] else ''}{row['us']:.1f}{gain} {row['roofline']:4.0%}"


def show_check(record: dict[str, Any], seconds: float) -> None:
    """The largest error of each dtype and set of kernels, and every failure."""
    console, outcomes = _console(), record["outcomes"]
    table = Table(title=f"correctness against float64 | {record['device']} | seed {record['seed']}")
    for name in ("cases of", "kernels", "cases", "products", "largest error", "wrong"):
        table.add_column(name)
    kinds = [(outcome["dtype"], outcome["bits"], tuple(outcome["kernels"])) for outcome in outcomes]
    for kind in dict.fromkeys(kinds):
        dtype, bits, kernels = kind
        group = [outcome for outcome, its in zip(outcomes, kinds, strict=True) if its == kind]
        worst, wrong = max(o["error"] for o in group), sum(len(o["wrong"]) for o in group)
        products = sum(o["products"] for o in group)
        values = (len(group), products, f"{worst:.2g}", wrong)
        table.add_row(f"{bits} bits {dtype}", ", ".join(kernels), *(str(value) for value in values))
    console.print(table)
    wrong_ones = [f"{o['case']}: {why}" for o in outcomes for why in o["wrong"]]
    _failures(console, wrong_ones, record["skipped"])
    total = sum(o["products"] for o in outcomes)
    console.print(f"{len(outcomes)} cases, {total} products, {len(wrong_ones)} wrong, {seconds:.0f} s", highlight=False)


def show_sweep(table: dict[str, Any]) -> None:
    """The rows of a launch table, the discarded configurations, the crossovers."""
    console = _console()
    shown = Table(title=f"launches | {table['device']}")
    columns = ("dtype", "bits", "group", "m", "k", "n", "bn", "warps", "stages", "split", "us", "tried")
    for name in columns:
        shown.add_column(name, justify="right")
    for row in table["rows"]:
        values = [f"{row[name]:.1f}" if name == "us" else str(row.get(name, "")) for name in columns]
        shown.add_row(*values)
    console.print(shown)
    for reason, count in sorted(table["discarded"].items()):
        console.print(f"discarded: {count} x {reason}", highlight=False)
    for one in table["crossover"]:
        what = f"{one['k']}x{one['n']} {one['dtype']} int{one['bits']} g{one['group']}"
        console.print(
            f"{what}: the Triton kernel is at least as fast as slab up to M={one['triton_wins_up_to']}", highlight=False
        )
    _failures(console, [], table["skipped"])


def _failures(console: Console, wrong: list[str], skipped: list[str]) -> None:
    for line in wrong:
        console.print(f"WRONG: {line}", highlight=False, markup=False)
    for line in skipped:
        console.print(f"skipped, no time: {line}", highlight=False, markup=False)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)
