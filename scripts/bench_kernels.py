"""Time every kernel beside cuBLAS, torch's int4 kernel and gemlite, after a check against float64.

    python scripts/bench_kernels.py                          # float16, groups of 128, symmetric; at most 7 minutes
    python scripts/bench_kernels.py --dtype bfloat16 --group 64 --asym --rows 1,16 --shapes 4096x4096
    python scripts/bench_kernels.py --check-only             # correctness only: every kernel, group size and odd shape
    python scripts/bench_kernels.py --self-test              # the same code on tiny shapes on the CPU: not a measurement

Prints a table per shape and writes one JSON file to --output. Exit status 1 if one of our kernels is wrong, a check was not
reached, or nothing was measured.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from llmq.bench.kernels import options

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
SELF_TEST_ROWS, SELF_TEST_SHAPES = "1,16,70", "256x128,384x192"


@dataclass(frozen=True)
class Run:
    """What all three modes need."""

    device: Any
    """torch.device."""
    output: Path
    """Folder of the JSON file."""
    seed: int
    """Of the inputs."""
    seconds: float
    """The time box."""
    self_test: bool
    """Whether nothing is a measurement."""

    def head(self) -> dict[str, Any]:
        """The head of the record."""
        from llmq.bench.record import about

        return about(self.device, ("scripts/bench_kernels.py", *sys.argv[1:]), self.seed, self.self_test)

    def path(self, name: str) -> Path:
        """The record's file."""
        from llmq.bench.record import name_of, slug

        return self.output / f"{name}-{slug(name_of(self.device))}.json"


def main(
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    bits: Annotated[int, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")] = 4,
    group: Annotated[int, typer.Option(help="Columns per scale, 0 per channel.")] = 128,
    asym: Annotated[bool, typer.Option("--asym", help="Weights with zero points.")] = False,
    rows: Annotated[str | None, typer.Option(help="M, separated by commas; default 1 to 1024.")] = None,
    shapes: options.Shapes = None,
    seconds: Annotated[float, typer.Option(help="Time box; what does not fit is listed.")] = 400,
    output: options.Output = None,
    tables: Annotated[Path | None, typer.Option(help="Folder of launch tables instead of kernels/tuned.")] = None,
    seed: options.Seed = None,
    jobs: Annotated[int, typer.Option(help="Processes of --check-only, each of which compiles.")] = 1,
    check_only: Annotated[bool, typer.Option("--check-only", help="Check correctness, time nothing.")] = False,
    small: Annotated[bool, typer.Option("--small", help="With --check-only: few cases, for slow tools.")] = False,
    ceilings_only: Annotated[
        bool, typer.Option("--ceilings-only", help="Measure only copy bandwidth and dense matmul.")
    ] = False,
    self_test: options.SelfTest = False,
) -> int:
    """Time every kernel beside cuBLAS, torch's int4 kernel and gemlite, after a check against float64."""
    options.interpret(self_test)
    from llmq.bench.record import measured_device, writable
    from llmq.errors import LlmqError

    options.dtypes(dtype)
    if bits not in (2, 3, 4, 8):
        raise LlmqError(f"--bits must be 2, 3, 4 or 8; got {bits}")
    device = measured_device(self_test)
    folder = writable(output or (Path(tempfile.mkdtemp()) if self_test else RESULTS))
    run = Run(device, folder, options.seed_or_new(seed), seconds, self_test)
    if check_only:
        return check(run, small or self_test, jobs)
    if ceilings_only:
        return ceilings(run)
    return bench(run, dtype, bits, group, not asym, rows, shapes, tables)


def bench(
    run: Run,
    dtype: str,
    bits: int,
    group: int,
    symmetric: bool,
    rows: str | None,
    shapes: str | None,
    tables: Path | None,
) -> int:
    """Measure. The record is written after each contender, so that an interrupted run keeps its results."""
    import torch

    from llmq.bench.kernels import benchmark, contenders
    from llmq.bench.kernels.tables import parse_shapes, show_bench
    from llmq.bench.kernels.timing import SELF_TEST, Effort
    from llmq.bench.kernels.timing import ceilings as measured
    from llmq.bench.record import write

    if run.self_test:
        rows, shapes = rows or SELF_TEST_ROWS, shapes or SELF_TEST_SHAPES
    config = contenders.KernelBenchConfig(
        device=run.device,
        dtype=getattr(torch, dtype),
        group_size=group,
        symmetric=symmetric,
        shapes=parse_shapes(shapes.split(",")) if shapes else contenders.SHAPES,
        rows=options.numbers("rows", rows) if rows else contenders.ROWS,
        seconds=run.seconds,
        seed=run.seed,
        effort=SELF_TEST if run.self_test else Effort(),
        tables=tables,
        bits=bits,
    )
    limits, results = measured(run.device, config.dtype, config.effort), benchmark.BenchResults()
    record = run.head() | {"dtype": dtype, "bits": bits, "group": group, "symmetric": symmetric}
    record |= {"ceilings": {"copy_bytes_per_s": limits.copy, "matmul_flops_per_s": limits.flops}}
    record |= {"absent": results.absent, "wrong": results.wrong, "skipped": results.skipped, "rows": results.rows}
    path = run.path(f"kernels-{dtype}-int{bits}-g{group or 'channel'}-{'sym' if symmetric else 'asym'}")

    def done(line: str) -> None:
        write(path, record)
        print(line, file=sys.stderr)

    benchmark.bench(config, limits, results, done)
    write(path, record)
    show_bench(record)
    print(f"written: {path}")
    return int(bool(results.wrong) or not results.rows)


def ceilings(run: Run) -> int:
    """Measure the limits of the device for both dtypes."""
    import torch

    from llmq.bench.kernels.timing import SELF_TEST, Effort
    from llmq.bench.kernels.timing import ceilings as measured
    from llmq.bench.record import write

    effort = SELF_TEST if run.self_test else Effort()
    limits = {name: asdict(measured(run.device, getattr(torch, name), effort)) for name in options.DTYPES}
    for name, limit in limits.items():
        print(f"{name}: copy {limit['copy'] / 1e12:.4g} TB/s, dense matmul {limit['flops'] / 1e12:.4g} TFLOP/s")
    write(run.path("ceilings"), run.head() | {"ceilings": limits})
    return 0


def check(run: Run, small: bool, jobs: int) -> int:
    """Compare every kernel with float64."""
    from llmq.bench.kernels import checking
    from llmq.bench.kernels.tables import show_check
    from llmq.bench.kernels.timing import Budget
    from llmq.bench.record import write

    budget, listed = Budget(run.seconds), checking.cases(small)
    work = partial(checking.check_case, device=str(run.device), seed=run.seed)
    outcomes = [outcome for _, outcome in checking.spread(work, listed, jobs, run.seconds)]
    missed = [str(case) for case in listed[len(outcomes) :]]
    record = run.head() | {"outcomes": [asdict(outcome) for outcome in outcomes], "skipped": missed}
    show_check(record, budget.spent())
    write(run.path("check"), record)
    return int(bool(missed) or any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    options.run(main)
