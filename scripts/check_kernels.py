"""Compile the GPU kernels for every architecture without a GPU, and fail where the machine code is not what was designed.

    python scripts/check_kernels.py [--arch sm_90 --arch gfx942] [--quick] [--jobs 2] [--json FILE] [--write]

One table: a row for each compiled launch, with the gates that it failed. All of them take a core ten minutes,
`--quick` one. Needs triton and rich, nothing else of llmq's dependencies. Never under TRITON_INTERPRET:
nothing is compiled there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from llmq.bench.kernels.gates import ARCHITECTURES, cases, failures, few_cases, ratchet
from llmq.bench.kernels.machine_code import Case, Report, Unpacking, read

Row = tuple[Case | Unpacking, Report, list[str]]


def _checked(case: Case | Unpacking) -> Row:
    report = read(case)
    return case, report, failures(case, report, _version())


def _version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this one (can be repeated)")
    parser.add_argument("--quick", action="store_true", help="only what CI has time for")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--write", action="store_true", help="lower the limits to what is reached now, add new ones")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("check_kernels compiles, and nothing is compiled under TRITON_INTERPRET=1: unset it", file=sys.stderr)
        return 2
    if asked.jobs < 1:
        parser.error(f"--jobs must be 1 or more; got {asked.jobs}")
    if importlib.util.find_spec("triton") is None:
        print("check_kernels compiles with triton, which is not installed: pip install triton", file=sys.stderr)
        return 2
    if asked.json:
        try:
            asked.json.touch()
        except OSError as error:
            parser.error(f"--json {asked.json} cannot be written: {error.strerror}")
    listed = [case for arch in asked.arch or ARCHITECTURES for case in (few_cases if asked.quick else cases)(arch)]
    with ProcessPoolExecutor(asked.jobs) as pool:
        rows = list(pool.map(_checked, listed))
    if asked.write:
        ratchet([(case, report) for case, report, _ in rows], _version())
    _show(rows)
    if asked.json:
        done = [asdict(case) | asdict(report) | {"failed": failed} for case, report, failed in rows]
        asked.json.write_text(json.dumps(done, indent=1))
    return int(any(failed for _, _, failed in rows))


def _show(rows: list[Row]) -> None:
    table = Table(title=f"machine code, triton {_version()}")
    for name in (
        "arch",
        "dtype",
        "bits",
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
            str(case.bits),
            str(case.group or "channel"),
            "" if case.symmetric else "yes",
            str(case.launch) if isinstance(case, Case) else "dequantize",
            str(report.registers),
            str(report.stack),
            str(report.shared),
            report.product,
            f"{report.per_weight:.2f}",
            "; ".join(failed) or "-",
        )
    # A pipe is not a terminal of 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    bad = sum(bool(failed) for _, _, failed in rows)
    print(f"{len(rows)} launches compiled, {bad} fail")


if __name__ == "__main__":
    sys.exit(main())
