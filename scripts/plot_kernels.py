"""Draw the records of scripts/bench_kernels.py in a folder: `python scripts/plot_kernels.py FOLDER`. Needs matplotlib."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmq.bench.kernels.plots import plot_record, records
from llmq.errors import LlmqError


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of kernels-*.json; the PNGs are put beside them")
    folder = parser.parse_args().folder
    try:
        for record in records(folder):
            for made in plot_record(record, folder):
                print(f"written: {made}")
    except LlmqError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
