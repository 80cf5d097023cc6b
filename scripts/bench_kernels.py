"""Time every kernel beside cuBLAS, torch's int4 kernel and gemlite, after a gate against float64. One command on your own GPU:

    python scripts/bench_kernels.py                          # float16, groups of 128, symmetric; at most 7 minutes
    python scripts/bench_kernels.py --dtype bfloat16 --group 64 --asym --rows 1 16 --shapes 4096x4096
    python scripts/bench_kernels.py --check-only             # correctness alone: every kernel, group size and odd shape
    python scripts/bench_kernels.py --self-test              # the same code on tiny shapes on the CPU: no measurement

A table for each shape and one JSON file in --output. Status 1 where one of our kernels is wrong, a check was not reached,
or nothing was measured.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "eval" / "results"
ROWS = (1, 16, 70)
SHAPES = ("256x128", "384x192")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4, help="of the weights (default 4)")
    parser.add_argument("--group", type=int, default=128, help="columns per scale, 0 per channel (default 128)")
    parser.add_argument("--asym", action="store_true", help="weights with zero points")
    parser.add_argument("--rows", type=int, nargs="+", help="M (default 1 to 1024)")
    parser.add_argument("--shapes", nargs="+", help="KxN (default 8 shapes, Llama-3-8B's among them)")
    parser.add_argument("--seconds", type=float, default=400, help="the time box; what it skips is listed")
    parser.add_argument(
        "--output", type=Path, help="folder of the JSON file (default eval/results; a new one in --self-test)"
    )
    parser.add_argument("--tables", type=Path, help="folder of launch tables in the place of kernels/tuned")
    parser.add_argument("--seed", type=int, help="of the inputs (default: another one each time)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes that check (--check-only), each compiling for itself"
    )
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--small", action="store_true", help="with --check-only: few cases, for slow tools")
    parser.add_argument("--ceilings-only", action="store_true", help="copy bandwidth and dense matmul alone")
    parser.add_argument("--self-test", action="store_true", help="tiny shapes on the CPU, Triton's interpreter")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    if asked.self_test:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is below
    from llmq.bench.record import measured_device, writable
    from llmq.errors import LlmqError

    asked.seed = secrets.randbelow(1 << 31) if asked.seed is None else asked.seed
    try:
        asked.device = measured_device(asked.self_test)
        asked.output = writable(asked.output or (Path(tempfile.mkdtemp()) if asked.self_test else RESULTS))
        return check(asked) if asked.check_only else ceilings(asked) if asked.ceilings_only else bench(asked)
    except LlmqError as error:
        print(error, file=sys.stderr)
        return 2


def head(asked: argparse.Namespace) -> dict[str, Any]:
    """What the record begins with."""
    from llmq.bench.record import about

    return about(asked.device, ("scripts/bench_kernels.py", *sys.argv[1:]), asked.seed, asked.self_test)


def place(asked: argparse.Namespace, name: str, record: dict[str, Any]) -> Path:
    """The record's file."""
    from llmq.bench.record import slug

    output: Path = asked.output
    return output / f"{name}-{slug(record['device'])}.json"


def bench(asked: argparse.Namespace) -> int:
    """Measure; the record is written after each contender, so that a run that is stopped leaves what it reached."""
    import torch

    from llmq.bench.kernels import benchmark as library
    from llmq.bench.kernels.tables import parse_shapes, show_bench
    from llmq.bench.kernels.timing import SELF_TEST, Effort
    from llmq.bench.kernels.timing import ceilings as measured
    from llmq.bench.record import write

    shapes = parse_shapes(asked.shapes or SHAPES) if asked.shapes or asked.self_test else library.SHAPES
    rows = tuple(asked.rows or (ROWS if asked.self_test else library.ROWS))
    effort, dtype = SELF_TEST if asked.self_test else Effort(), getattr(torch, asked.dtype)
    plan = library.Plan(
        asked.device, dtype, asked.group, not asked.asym, shapes, rows, asked.seconds, asked.seed, effort,
        asked.tables, asked.bits,
    )  # fmt: skip
    limits, findings = measured(plan.device, dtype, effort), library.Findings()
    record = head(asked) | {"dtype": asked.dtype, "bits": asked.bits, "group": asked.group, "symmetric": plan.symmetric}
    record |= {"ceilings": {"copy_bytes_per_s": limits.copy, "matmul_flops_per_s": limits.flops}}
    record |= {"absent": findings.absent, "wrong": findings.wrong, "skipped": findings.skipped, "rows": findings.rows}
    path = place(
        asked,
        f"kernels-{asked.dtype}-int{asked.bits}-g{asked.group or 'channel'}-{'asym' if asked.asym else 'sym'}",
        record,
    )

    def done(line: str) -> None:
        write(path, record)
        print(line, file=sys.stderr)

    library.bench(plan, limits, findings, done)
    write(path, record)
    show_bench(record)
    print(f"written: {path}")
    return int(bool(findings.wrong) or not findings.rows)


def ceilings(asked: argparse.Namespace) -> int:
    import torch

    from llmq.bench.kernels.timing import SELF_TEST, Effort
    from llmq.bench.kernels.timing import ceilings as measured
    from llmq.bench.record import write

    effort = SELF_TEST if asked.self_test else Effort()
    found = {name: asdict(measured(asked.device, getattr(torch, name), effort)) for name in ("float16", "bfloat16")}
    for name, one in found.items():
        print(f"{name}: copy {one['copy'] / 1e12:.4g} TB/s, dense matmul {one['flops'] / 1e12:.4g} TFLOP/s")
    record = head(asked) | {"ceilings": found}
    write(place(asked, "ceilings", record), record)
    return 0


def check(asked: argparse.Namespace) -> int:
    from llmq.bench.kernels import checking
    from llmq.bench.kernels.tables import show_check
    from llmq.bench.kernels.timing import Budget
    from llmq.bench.record import write

    budget, small = Budget(asked.seconds), asked.small or asked.self_test
    listed = checking.cases(small)
    work = partial(checking.check, device=str(asked.device), seed=asked.seed)
    outcomes = [outcome for _, outcome in checking.spread(work, listed, asked.jobs, asked.seconds)]
    missed = [str(case) for case in listed[len(outcomes) :]]
    record = head(asked) | {"outcomes": [asdict(outcome) for outcome in outcomes], "skipped": missed}
    show_check(record, budget.spent())
    write(place(asked, "check", record), record)
    return int(bool(missed) or any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
