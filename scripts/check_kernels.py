"""Compile the GPU kernels for every architecture without a GPU, and fail where the machine code is not what was designed.

    python scripts/check_kernels.py [--arch sm_90 --arch gfx942] [--jobs 2] [--json FILE]

One table: a row for each compiled launch, with the gates that it failed. Needs triton and rich, nothing else of llmq's
dependencies. Never under TRITON_INTERPRET: nothing is compiled there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from llmq.kernels.ahead import Case, Report, read
from llmq.kernels.gates import ARCHITECTURES, cases, failures


def _checked(case: Case) -> tuple[Case, Report, list[str]]:
    report = read(case)
    return case, report, failures(case, report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this one (can be repeated)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("check_kernels compiles, and nothing is compiled under TRITON_INTERPRET=1: unset it", file=sys.stderr)
        return 2
    listed = [case for arch in asked.arch or ARCHITECTURES for case in cases(arch)]
    with ProcessPoolExecutor(asked.jobs) as pool:
        rows = list(pool.map(_checked, listed))
    _show(rows)
    if asked.json:
        done = [asdict(case) | asdict(report) | {"failed": failed} for case, report, failed in rows]
        asked.json.write_text(json.dumps(done, indent=1))
    return int(any(failed for _, _, failed in rows))


def _show(rows: list[tuple[Case, Report, list[str]]]) -> None:
    import triton

    table = Table(title=f"few-rows kernel, triton {triton.__version__}")
    for name in (
        "arch",
        "dtype",
        "group",
        "zeros",
        "launch",
        "regs",
        "stack",
        "smem",
        "product",
        "instr/weight",
        "fails",
    ):
        table.add_column(name, justify="left" if name in ("arch", "dtype", "launch", "product", "fails") else "right")
    for case, report, failed in rows:
        table.add_row(
            case.arch,
            case.dtype,
            str(case.group or "channel"),
            "" if case.symmetric else "yes",
            str(case.launch),
            str(report.registers),
            str(report.stack),
            str(report.shared),
            report.product,
            "" if report.per_weight is None else f"{report.per_weight:.2f}",
            "; ".join(failed) or "-",
        )
    # A pipe is not a terminal of 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    bad = sum(bool(failed) for _, _, failed in rows)
    print(f"{len(rows)} launches compiled, {bad} fail")


if __name__ == "__main__":
    sys.exit(main())
