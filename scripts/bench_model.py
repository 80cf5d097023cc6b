"""Tokens per second of a model, packed beside the original: prefill and decode, eager and by CUDA graph; load time, memory.

    python scripts/bench_model.py ORIGINAL PACKED               a model and the folder that llmq made of it
    python scripts/bench_model.py --shape llama-3-8b            random weights, made on the device; no network, no disk
    python scripts/bench_model.py --shape tiny --overhead       what Python costs beyond the kernels, on any machine
    python scripts/bench_model.py --self-test                   all of it on a tiny model on the CPU, in seconds

First the packed models are held against their dequantized weights with random prompts (`llmq/bench/gate.py`): where that
fails nothing is measured and the exit status is 2. Tables, then one line of JSON, which `--output FOLDER` writes there too.
How the overhead is measured: `llmq/bench/overhead.py`.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from llmq.bench.record import writable, write
from llmq.cli.commands import open_named
from llmq.cli.console import make_console, print_json
from llmq.cli.guard import run_guarded
from llmq.config import QuantConfig
from llmq.errors import LlmqError
from llmq.memory import format_bytes

TABLES = {
    "models": ("variant", "seconds", "held_bytes", "peak_bytes", "how"),
    "gate": (
        *("model", "linears_worst", "logits_apart", "logits_allowed"),
        *("tokens_compared", "sequences_undecided"),
    ),
    "rows": (
        *("what", "how", "batch", "tokens", "variant", "tokens_per_second"),
        *("ms_per_forward", "fastest_ms", "slowest_ms", "speedup", "runs"),
    ),
    "overhead": ("variant", "linears", "linear_us", "block_us", "added_to_block_us", "runs"),
    "launch": ("n", "k", "host_us"),
}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="ORIGINAL PACKED; the original may be `demo`")
    parser.add_argument("--shape", help="tiny or llama-3-8b, in the place of models")
    parser.add_argument("--group-size", type=int, default=128, help="of a shape's weights")
    parser.add_argument("--asym", action="store_true", help="a shape's weights with zero points")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="bfloat16", help="of activations: bfloat16 or float16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences decoded at a time")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt that is timed")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before those that are decoded")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in one run")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each case at most")
    parser.add_argument(
        "--seconds", type=float, default=300, help="for all of it: what is left after the gate is measured"
    )
    parser.add_argument("--seed", type=int, help="of random prompts, rows and weights [drawn]")
    parser.add_argument("--overhead", action="store_true", help="measure the host's share in the place of speed")
    parser.add_argument("--self-test", action="store_true", help="a tiny model on the CPU, speed and overhead")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    return parser.parse_args(arguments)


def measured(told: argparse.Namespace, command: list[str], console: Console) -> dict[str, Any]:
    """The library call that the arguments ask for."""
    from llmq.bench.run import Asked, bench
    from llmq.bench.speed import Sizes

    if told.models and len(told.models) != 2:
        raise LlmqError(f"MODEL must be two, ORIGINAL PACKED; got {' '.join(told.models)}")
    if told.self_test and (told.models or told.shape):
        raise LlmqError("--self-test takes no model and no --shape: it has its own")
    sizes = Sizes(tuple(told.batches), told.prefill, told.prompt, told.new, told.rounds)
    if told.self_test:
        told.shape, told.device = "tiny", "cpu"
        sizes = Sizes((1, 2), 64, 8, 4, 2)
    asked = Asked(
        original=open_named(told.models[0]) if told.models else None,
        folder=told.models[1] if told.models else None,
        shape=told.shape,
        config=QuantConfig(method="rtn", group_size=told.group_size, symmetric=not told.asym),
        device=told.device,
        dtype=told.dtype,
        sizes=sizes,
        seconds=told.seconds,
        seed=secrets.randbelow(1 << 31) if told.seed is None else told.seed,
        speed=told.self_test or not told.overhead,
        overhead=told.self_test or told.overhead,
        self_test=told.self_test,
    )
    return bench(asked, command, lambda line: console.print(f"{line} ..."))


def show(console: Console, found: dict[str, Any]) -> None:
    console.print(f"{found['source']}, {found['dtype']}, on {found['device']}, {found['threads']} CPU threads")
    for name, columns in TABLES.items():
        if not found[name]:
            continue
        table = Table(title=name)
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for row in found[name]:
            table.add_row(*(_cell(column, row[column]) for column in columns))
        console.print(table)
    for note in dict.fromkeys(row["note"] for row in found["rows"] if row["note"]):
        console.print(f"fast: {note}")
    for row in found["missing"]:
        console.print(f"not measured: {row['what']} {row['how']}, batch {row['batch']}: {row['why']}")
    if found["process_peak_bytes"]:
        console.print(f"peak of the process, all models together: {format_bytes(found['process_peak_bytes'])} resident")


def _cell(column: str, value: Any) -> str:
    if column.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    told = parsed(sys.argv[1:])
    console = make_console(quiet=False)
    output = writable(told.output) if told.output else None
    found = measured(told, [Path(sys.argv[0]).name, *sys.argv[1:]], console)
    show(console, found)
    if output:
        name = told.shape or Path(told.models[1]).name
        stamp = found["date"].replace(":", "").replace("+0000", "")
        file = output / f"bench_model-{name}-{stamp}.json"
        write(file, found)
        console.print(f"-> {file}")
    print_json(found)


if __name__ == "__main__":
    run_guarded(main)
