"""Sweep the launches of the Triton kernel on your GPU, and write the table that `kernels/launch.py` reads.

    python scripts/tune_kernels.py                     # kernels/tuned/<device>.json, at most 5 minutes
    python scripts/tune_kernels.py --dtype bfloat16 float16 --group 128 64 --jobs 8 --seconds 1200
    python scripts/tune_kernels.py --self-test         # the same code in Triton's interpreter on the CPU: no measurement

The most important shapes come first; a sweep that its time box ended goes on where it was when it is run again. Each
configuration is judged against float64 before it is timed. --jobs processes compile configurations ahead.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = ("256x128",)
COMPILING, SWEEPING = 0.4, 0.85  # of the time box: from its start to the end of each; crossovers have the rest


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"])
    parser.add_argument("--group", type=int, nargs="+", default=[128], help="columns per scale, 0 per channel")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8), default=[4], help="of the weights (default 4)")
    parser.add_argument("--shapes", nargs="+", help="KxN (default five)")
    parser.add_argument(
        "--seconds", type=float, default=300, help="the time box, compiling ahead and crossovers included"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the table (default kernels/tuned; a new one in --self-test)"
    )
    parser.add_argument("--seed", type=int, help="of the inputs (default: another one each time)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile ahead")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the table has")
    parser.add_argument("--self-test", action="store_true", help="one tiny shape on the CPU, Triton's interpreter")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    if asked.self_test:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is below
    import importlib.util

    from llmq.errors import LlmqError

    if importlib.util.find_spec("triton") is None:
        print("what is tuned is a Triton kernel, and triton is not installed: pip install triton", file=sys.stderr)
        return 2
    asked.seed = secrets.randbelow(1 << 31) if asked.seed is None else asked.seed
    try:
        return tune(asked)
    except LlmqError as error:
        print(error, file=sys.stderr)
        return 2


def tune(asked: argparse.Namespace) -> int:
    """Sweep, then the crossovers; the table is written after every row."""
    from llmq.bench.kernels import tuning
    from llmq.bench.kernels.tables import parse_shapes, show_sweep
    from llmq.bench.kernels.timing import SELF_TEST, Budget, Effort
    from llmq.bench.record import about, measured_device, slug, writable
    from llmq.kernels import wna16

    budget, sweeping = Budget(asked.seconds), Budget(SWEEPING * asked.seconds)
    device = measured_device(asked.self_test)
    known, effort = wna16.device_of(device), SELF_TEST if asked.self_test else Effort()
    head = about(device, ("scripts/tune_kernels.py", *sys.argv[1:]), asked.seed, asked.self_test)
    folder = writable(asked.output or (Path(tempfile.mkdtemp()) if asked.self_test else ROOT / "kernels" / "tuned"))
    path = folder / f"{slug(head['device'])}.json"
    shapes = parse_shapes(asked.shapes or SHAPES) if asked.shapes or asked.self_test else None
    sizes = tuning.SIZES if shapes is None else [(shape.k, shape.n) for shape in shapes]
    found = tuning.Sweep() if asked.again else tuning.load(path, known)
    listed = tuning.tasks(known.arch, asked.dtype, asked.group, sizes, asked.bits)
    choices, rows = tuning.candidates, tuning.CROSSOVER_ROWS
    if asked.self_test:
        listed, rows = listed[:2], (1, 70)
        choices = lambda device, task: tuning.candidates(device, task)[::9]  # noqa: E731
    compile_ahead(asked, device, listed, budget)

    def save() -> None:
        tuning.save(path, known, head, found)
        row = found.rows[-1]
        print(
            f"{row['dtype']} int{row['bits']} g{row['group']} M={row['m']} {row['k']}x{row['n']}: {row['us']:.1f} us",
            file=sys.stderr,
        )

    tuning.sweep(listed, device, sweeping, asked.seed, effort, found, choices, save)
    tuning.crossover(listed, device, budget, asked.seed, effort, found, rows)
    tuning.save(path, known, head, found)
    show_sweep({**head, **vars(found)})
    print(f"written: {path}")
    return int(not found.rows or bool(found.wrong()))


def compile_ahead(asked: argparse.Namespace, device: object, listed: list[object], budget: object) -> None:
    """Fill Triton's cache from several processes, within a part of the time."""
    from llmq.bench.kernels import tuning
    from llmq.bench.kernels.checking import spread

    if asked.jobs < 2:
        return
    items = list(tuning.ahead(listed, device, 4 * asked.jobs))
    seconds = COMPILING * asked.seconds
    launched = sum(count for _, count in spread(tuning.compile_ahead, items, asked.jobs, seconds))
    print(f"compiled ahead: {launched} configurations in {budget.spent():.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
