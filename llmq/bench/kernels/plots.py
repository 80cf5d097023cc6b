"""PNGs of the records of `scripts/bench_kernels.py`: speed-up over the dense matmul and share of the roofline, against M.

One figure of each kind per record, one panel per shape. A filled marker is the kernel that llmq runs at that M. Only the JSON
is read; its device, versions and self-test flag are printed on the figure. Needs matplotlib (`pip install 'llmq[plots]'`).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError

STYLES = {  # colour, line, marker; distinguishable for the colour-blind
    "triton": ("#0072B2", "-", "o"),
    "slab": ("#56B4E9", "--", "s"),
    "cpu_int4": ("#0072B2", "-.", "P"),
    "dense": ("#7f7f7f", "-", "D"),
    "torch int4": ("#E69F00", "-", "^"),
    "gemlite": ("#009E73", "-", "v"),
}
NAMES = {"triton": "llmq, Triton kernel", "slab": "llmq, slab path", "cpu_int4": "llmq, CPU int4"}
OTHER = ("#CC79A7", ":", "x")
COLUMNS = 4
PANEL = (3.1, 2.7)  # inches
NARROW = 7.6


def plot_record(path: Path, folder: Path) -> list[Path]:
    """The figures of one record, in `folder`: <record>-speedup.png and <record>-roofline.png.

    Raises `LlmqError` if matplotlib is missing or the file is not a record of the benchmark.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LlmqError("plots require the package matplotlib, which is not installed: pip install 'llmq[plots]'")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise LlmqError(
            f"{path} is not complete JSON: {error}; use a file written by scripts/bench_kernels.py"
        ) from None
    if not (isinstance(record, dict) and record.get("rows") and "ceilings" in record and "dtype" in record):
        raise LlmqError(f"{path} has no benchmark rows; use a file written by scripts/bench_kernels.py")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for kind, draw in (("speedup", _speedup), ("roofline", _roofline)):
        target = folder / f"{path.stem}-{kind}.png"
        _figure(record, kind, draw, target)
        made.append(target)
    return made


def records(folder: Path) -> list[Path]:
    """The benchmark's records in a folder. Raises `LlmqError` if there is none."""
    files = sorted(folder.glob("kernels-*.json"))
    if not files:
        raise LlmqError(f"{folder} has no kernels-*.json; run scripts/bench_kernels.py --output {folder} first")
    return files


def _figure(record: dict[str, Any], kind: str, draw: Any, target: Path) -> None:
    from matplotlib.figure import Figure

    rows = record["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    across = min(COLUMNS, len(shapes))
    down = -(-len(shapes) // across)
    size = (max(NARROW, PANEL[0] * across), PANEL[1] * down + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for index, shape in enumerate(shapes):
        axes = grid[index // across][index % across]
        here = [row for row in rows if row["shape"] == shape]
        draw(axes, here, handles)
        layer = f"\n{here[0]['layer']}" if here[0]["layer"] else ""
        axes.set_title(f"K x N = {shape}{layer}", fontsize=9)
        if index % across == 0:
            axes.set_ylabel(_label(record, kind), fontsize=9)
        if index + across >= len(shapes):
            axes.set_xlabel("M, rows of x", fontsize=9)
    for index in range(len(shapes), down * across):
        grid[index // across][index % across].set_visible(False)
    grid[0][0].set_ylim(bottom=0)  # shared by all panels; last, because setting a limit ends autoscaling
    figure.suptitle(_title(record, kind), fontsize=11)
    columns = min(len(handles), 4 if across < COLUMNS else 7)
    legend = {"loc": "outside lower center", "ncols": columns, "fontsize": 9, "title_fontsize": 9, "frameon": False}
    figure.legend(handles.values(), handles.keys(), title="filled marker: the kernel llmq runs at this M", **legend)
    figure.savefig(target, dpi=160)


def _dense(record: dict[str, Any]) -> str:
    return "cuBLAS" if record["arch"].startswith("sm_") else "the dense matmul"


def _label(record: dict[str, Any], kind: str) -> str:
    return f"speed-up over {_dense(record)}" if kind == "speedup" else "share of the roofline, %"


def _title(record: dict[str, Any], kind: str) -> str:
    group = f"group {record['group']}" if record["group"] else "per channel"
    zeros = "symmetric" if record["symmetric"] else "asymmetric"
    what = "Speed-up" if kind == "speedup" else "Share of the roofline"
    versions = ", ".join(
        f"{name} {record['versions'][name]}" for name in ("torch", "triton") if record["versions"][name]
    )
    first = f"{what}, {record['bits']}-bit weights, {group}, {zeros}, {record['dtype']}"
    last = "SELF-TEST of the script, not a measurement" if record["self_test"] else f"{versions}, {record['date'][:10]}"
    return f"{first}\n{record['device']}: {last}"


def _axes(axes: Any, rows: list[dict[str, Any]]) -> None:
    ticks = sorted({row["m"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7.5, rotation=45 if len(ticks) > 6 else 0)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _lines(axes: Any, rows: list[dict[str, Any]], key: str, factor: float, handles: dict[str, Any]) -> None:
    """A line for each contender, with filled markers where llmq runs it."""
    for what in dict.fromkeys(row["what"] for row in rows):
        points = sorted((row["m"], row[key] * factor, row["preferred"]) for row in rows if row["what"] == what)
        colour, style, marker = STYLES.get(what, OTHER)
        places, values = [point[0] for point in points], [point[1] for point in points]
        options = {"color": colour, "linestyle": style, "marker": marker, "markersize": 5, "linewidth": 1.4}
        (line,) = axes.plot(places, values, markerfacecolor="white", **options)
        chosen = [point for point in points if point[2]]
        axes.plot(
            [p[0] for p in chosen], [p[1] for p in chosen], color=colour, marker=marker, markersize=5, linestyle=""
        )
        handles.setdefault(NAMES.get(what, what), line)
    _axes(axes, rows)


def _speedup(axes: Any, rows: list[dict[str, Any]], handles: dict[str, Any]) -> None:
    shown = [row for row in rows if row["speedup"] is not None and row["what"] != "dense"]
    line = axes.axhline(1.0, color=STYLES["dense"][0], linewidth=1.2)
    handles.setdefault("dense = 1", line)
    _lines(axes, shown, "speedup", 1.0, handles)


def _roofline(axes: Any, rows: list[dict[str, Any]], handles: dict[str, Any]) -> None:
    line = axes.axhline(100.0, color="black", linewidth=0.9, linestyle=":")
    handles.setdefault("measured copy or matmul", line)
    _lines(axes, rows, "roofline", 100.0, handles)
