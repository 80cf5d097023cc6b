"""Draw the records of scripts/bench_kernels.py in a folder: `python scripts/plot_kernels.py FOLDER`. Needs matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from llmq.bench.kernels import options
from llmq.bench.kernels.plots import plot_record, records


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of kernels-*.json; the PNGs are written beside them.")],
) -> int:
    """Draw the records of scripts/bench_kernels.py in a folder."""
    for record in records(folder):
        for figure in plot_record(record, folder):
            print(f"written: {figure}")
    return 0


if __name__ == "__main__":
    options.run(main)
