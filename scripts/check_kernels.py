"""Compile the GPU kernels for every architecture without a GPU, and fail if the machine code exceeds its limits.

    python scripts/check_kernels.py [--arch sm_90 --arch gfx942] [--quick] [--jobs 2] [--json FILE] [--write]

Prints a table with a row for each compiled launch and the limits that it exceeds (`llmq/bench/kernels/limits.py`). All
launches take a core ten minutes, `--quick` takes one. Needs only triton and rich. Does not run under TRITON_INTERPRET, where
nothing is compiled.
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

from llmq.bench.kernels.limits import ARCHITECTURES, cases, failures, few_cases, lower_limits
from llmq.bench.kernels.machine_code import DequantCase, MachineCode, MatmulCase, read

Checked = tuple[MatmulCase | DequantCase, MachineCode, list[str]]
"""A case, its machine code, and the limits that it exceeds."""


def _checked(case: MatmulCase | DequantCase) -> Checked:
    code = read(case)
    return case, code, failures(case, code, _version())


def _version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def main() -> int:
    """Compile, read and check every case; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this architecture; repeatable")
    parser.add_argument("--quick", action="store_true", help="the launches that CI has time for")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--write", action="store_true", help="lower limits to the current results, add missing ones")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("nothing is compiled under TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {options.jobs}")
    if importlib.util.find_spec("triton") is None:
        print("check_kernels requires triton, which is not installed: pip install triton", file=sys.stderr)
        return 2
    if options.json:
        try:
            options.json.touch()
        except OSError as error:
            parser.error(f"--json {options.json} is not writable: {error.strerror}")
    listed = [case for arch in options.arch or ARCHITECTURES for case in (few_cases if options.quick else cases)(arch)]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(_checked, listed))
    if options.write:
        lower_limits([(case, code) for case, code, _ in rows], _version())
    _show(rows)
    if options.json:
        done = [asdict(case) | asdict(code) | {"failed": failed} for case, code, failed in rows]
        options.json.write_text(json.dumps(done, indent=1))
    return int(any(failed for _, _, failed in rows))


def _show(rows: list[Checked]) -> None:
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
    for case, code, failed in rows:
        table.add_row(
            case.arch,
            case.dtype,
            str(case.bits),
            str(case.group or "channel"),
            "" if case.symmetric else "yes",
            ("grouped " if case.grouped else "") + str(case.launch) if isinstance(case, MatmulCase) else "dequantize",
            str(code.registers),
            str(code.stack),
            str(code.shared),
            code.product,
            f"{code.per_weight:.2f}",
            "; ".join(failed) or "-",
        )
    # Without a terminal rich would use 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    bad = sum(bool(failed) for _, _, failed in rows)
    print(f"{len(rows)} launches compiled, {bad} fail")


if __name__ == "__main__":
    sys.exit(main())
