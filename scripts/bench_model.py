"""Tokens per second of a model, packed and original: prefill and decode, eager and by CUDA graph; load time, memory.

    python scripts/bench_model.py ORIGINAL PACKED               a model and the folder that llmq made of it
    python scripts/bench_model.py --shape llama-3-8b            random weights, made on the device; no network, no disk
    python scripts/bench_model.py --shape tiny --overhead       host time beyond the kernels, on any machine
    python scripts/bench_model.py --self-test                   everything on a tiny model on the CPU, in seconds

First the packed models are compared with their dequantized weights on random prompts (`llmq/bench/correctness.py`). If that
fails, nothing is measured and the exit status is 2. Prints tables, then one line of JSON; `--output FOLDER` also writes the
JSON to a file. `llmq/bench/overhead.py` explains how the host time is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer
from rich.console import Console
from rich.table import Table

from llmq.bench.kernels import options
from llmq.bench.record import writable, write
from llmq.bench.run import BenchConfig, bench
from llmq.bench.speed import Sizes
from llmq.cli.commands import open_named
from llmq.cli.console import make_console, print_json
from llmq.config import QuantConfig
from llmq.errors import LlmqError
from llmq.memory import format_bytes

TABLES = {
    "models": ["variant", "seconds", "resident_bytes", "peak_bytes", "how"],
    "correctness": [
        "model",
        "linears_worst",
        "logits_distance",
        "logits_allowed",
        "tokens_compared",
        "sequences_undecided",
    ],
    "rows": [
        "what",
        "how",
        "batch",
        "tokens",
        "variant",
        "tokens_per_second",
        "ms_per_forward",
        "fastest_ms",
        "slowest_ms",
        "speedup",
        "runs",
    ],
    "overhead": ["variant", "linears", "linear_us", "block_us", "added_to_block_us", "runs"],
    "launch": ["n", "k", "host_us"],
}
"""Key of the record -> columns of its table."""
SELF_TEST_SIZES = Sizes(batches=(1, 2), prefill=64, prompt=8, new=4, rounds=2)


def main(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="ORIGINAL PACKED", help="The original may be `demo`.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="tiny or llama-3-8b, instead of models.")] = None,
    group_size: Annotated[int, typer.Option(help="Group size of a shape's weights.")] = 128,
    asym: Annotated[bool, typer.Option("--asym", help="Zero points for a shape's weights.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of activations: bfloat16 or float16.")] = "bfloat16",
    batches: Annotated[str, typer.Option(help="Sequences decoded at a time, separated by commas.")] = "1,8,32",
    prefill: Annotated[int, typer.Option(help="Tokens of the timed prompt.")] = 2048,
    prompt: Annotated[int, typer.Option(help="Tokens before the decoded ones.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens decoded in one run.")] = 32,
    rounds: Annotated[int, typer.Option(help="The most runs of each case.")] = 15,
    seconds: Annotated[float, typer.Option(help="Time box for everything, correctness checks included.")] = 300,
    seed: options.Seed = None,
    overhead: Annotated[bool, typer.Option("--overhead", help="Measure host time instead of speed.")] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="A tiny model on the CPU, speed and host time.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the JSON file.")] = None,
) -> int:
    """Tokens per second of a model, packed and original.

    \f
    (Over 50 lines: every option is one.)
    """
    if models and len(models) != 2:
        raise LlmqError(f"give two models, ORIGINAL PACKED; got {' '.join(models)}")
    if self_test and (models or shape):
        raise LlmqError("--self-test has its own model; give no model and no --shape")
    if self_test:
        shape, device, sizes = "tiny", "cpu", SELF_TEST_SIZES
    else:
        sizes = Sizes(options.numbers("batches", batches), prefill, prompt, new, rounds)
    config = BenchConfig(
        original=open_named(models[0]) if models else None,
        folder=models[1] if models else None,
        shape=shape,
        config=QuantConfig(method="rtn", group_size=group_size, symmetric=not asym),
        device=device,
        dtype=dtype,
        sizes=sizes,
        seconds=seconds,
        seed=options.seed_or_new(seed),
        speed=self_test or not overhead,
        overhead=self_test or overhead,
        self_test=self_test,
    )
    console = make_console(quiet=False)
    folder = writable(output) if output else None
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    record = bench(config, command, lambda line: console.print(f"{line} ..."))
    show(console, record)
    if folder:
        stamp = record["date"].replace(":", "").replace("+0000", "")
        file = folder / f"bench_model-{shape or Path(str(config.folder)).name}-{stamp}.json"
        write(file, record)
        console.print(f"-> {file}")
    print_json(record)
    return 0


def show(console: Console, record: dict[str, Any]) -> None:
    """Print the tables of a record."""
    console.print(f"{record['source']}, {record['dtype']}, on {record['device']}, {record['threads']} CPU threads")
    for name, columns in TABLES.items():
        if not record[name]:
            continue
        table = Table(title=name)
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for row in record[name]:
            table.add_row(*(_cell(column, row[column]) for column in columns))
        console.print(table)
    for note in dict.fromkeys(row["note"] for row in record["rows"] if row["note"]):
        console.print(f"fast: {note}")
    for row in record["missing"]:
        console.print(f"not measured: {row['what']} {row['how']}, batch {row['batch']}: {row['why']}")
    if record["process_peak_bytes"]:
        console.print(
            f"peak of the process, all models together: {format_bytes(record['process_peak_bytes'])} resident"
        )


def _cell(column: str, value: Any) -> str:
    if column.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    options.run(main)
