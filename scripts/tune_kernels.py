"""Sweep the launches of the Triton kernel on your GPU, and write the table that `kernels/launch.py` reads.

    python scripts/tune_kernels.py                     # kernels/tuned/<device>.json, at most 5 minutes
    python scripts/tune_kernels.py --dtype bfloat16,float16 --group 128,64 --jobs 8 --seconds 1200
    python scripts/tune_kernels.py --self-test         # the same code in Triton's interpreter on the CPU: not a measurement

The most important shapes come first. If the time box ends a sweep, the next run continues it. Each configuration is compared
with float64 before it is timed. --jobs processes compile configurations ahead.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from llmq.bench.kernels import options

ROOT = Path(__file__).resolve().parent.parent
SELF_TEST_SHAPES = "256x128"
COMPILING, SWEEPING = (
    0.4,
    0.85,
)  # shares of the time box, from its start to the end of each stage; crossovers get the rest


def main(
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or both.")] = "float16,bfloat16",
    group: Annotated[str, typer.Option(help="Columns per scale, 0 per channel; separated by commas.")] = "128",
    bits: Annotated[str, typer.Option(help="Bits of a weight: 4, 8 or both.")] = "4",
    shapes: options.Shapes = None,
    seconds: Annotated[float, typer.Option(help="Time box, compiling ahead and crossovers included.")] = 300,
    output: options.Output = None,
    seed: options.Seed = None,
    jobs: Annotated[int, typer.Option(help="Processes that compile ahead.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Measure the rows of the table again.")] = False,
    self_test: options.SelfTest = False,
) -> int:
    """Sweep the launches, then the crossovers. The table is written after every row.

    \f
    (Over 50 lines: every option is one.)
    """
    options.interpret(self_test)
    from llmq.errors import LlmqError

    if importlib.util.find_spec("triton") is None:
        raise LlmqError("tuning requires the package triton, which is not installed: pip install triton")
    from llmq.bench.kernels import tuning
    from llmq.bench.kernels.tables import parse_shapes, show_sweep
    from llmq.bench.kernels.timing import SELF_TEST, Budget, Effort
    from llmq.bench.record import about, measured_device, slug, writable
    from llmq.kernels import wna16

    widths = options.numbers("bits", bits)
    if not set(widths) <= {4, 8}:
        raise LlmqError(f"--bits must be 4 or 8; got {bits}")
    budget, sweeping = Budget(seconds), Budget(SWEEPING * seconds)
    device, seed = measured_device(self_test), options.seed_or_new(seed)
    known, effort = wna16.device_of(device), SELF_TEST if self_test else Effort()
    head = about(device, ("scripts/tune_kernels.py", *sys.argv[1:]), seed, self_test)
    folder = writable(output or (Path(tempfile.mkdtemp()) if self_test else ROOT / "kernels" / "tuned"))
    path = folder / f"{slug(head['device'])}.json"
    typed = shapes or (SELF_TEST_SHAPES if self_test else None)
    sizes = [(shape.k, shape.n) for shape in parse_shapes(typed.split(","))] if typed else tuning.SIZES
    results = tuning.Sweep() if again else tuning.load(path, known)
    listed = tuning.tasks(known.arch, options.dtypes(dtype), options.numbers("group", group), sizes, widths)
    choices, rows = tuning.candidates, tuning.CROSSOVER_ROWS
    if self_test:
        listed, rows = listed[:2], (1, 70)
        choices = lambda device, task: tuning.candidates(device, task)[::9]  # noqa: E731
    if jobs > 1:
        compile_ahead(device, listed, jobs, COMPILING * seconds)

    def save() -> None:
        tuning.save(path, known, head, results)
        row = results.rows[-1]
        case = f"{row['dtype']} int{row['bits']} g{row['group']} M={row['m']} {row['k']}x{row['n']}"
        print(f"{case}: {row['us']:.1f} us", file=sys.stderr)

    tuning.sweep(listed, device, sweeping, seed, effort, results, choices, save)
    tuning.crossover(listed, device, budget, seed, effort, results, rows)
    tuning.save(path, known, head, results)
    show_sweep({**head, **vars(results)})
    print(f"written: {path}")
    return int(not results.rows or bool(results.wrong()))


def compile_ahead(device: Any, listed: list[Any], jobs: int, seconds: float) -> None:
    """Fill Triton's cache from several processes, within `seconds`."""
    from llmq.bench.kernels import tuning
    from llmq.bench.kernels.checking import spread
    from llmq.bench.kernels.timing import Budget

    budget, items = Budget(seconds), list(tuning.ahead(listed, device, 4 * jobs))
    launched = sum(count for _, count in spread(tuning.compile_ahead, items, jobs, seconds))
    print(f"compiled ahead: {launched} configurations in {budget.spent():.0f} s", file=sys.stderr)


if __name__ == "__main__":
    options.run(main)
