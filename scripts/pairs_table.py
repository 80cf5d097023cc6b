"""Print docs/pairs.md: the rescalable pairs of each tested architecture, and the groups of linears that have none.

Usage: `python scripts/pairs_table.py > docs/pairs.md`. The models are the tests' tiny ones: which pairs there are depends
on the architecture's code, not on its size.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `tests` belongs to the clone and is never installed

from llmq.transforms.discovery import find_pairs
from llmq.transforms.pairs import NoPair
from tests.tiny import ARCHITECTURES, taken_apart

HEAD = """# Pairs that AWQ may rescale

Found by running one block and proven by a probe (`llmq/transforms/discovery.py`); made by `python scripts/pairs_table.py`.
A scale moves from the producer's channels to the consumers' columns.

| architecture | producer → consumers | not rescaled |
|---|---|---|"""


def table_row(arch: str) -> str:
    """The line of the table for one architecture."""
    rescaled, left = [], []
    for pair in find_pairs(*taken_apart(arch)).pairs:
        consumers = " ".join(_last_part(name) for name in pair.consumers)
        if isinstance(pair, NoPair):
            left.append(f"{consumers}: {pair.reason}")
        else:
            form = {"one_plus": " (1 + w)"}.get(pair.form, "")
            rescaled.append(f"{_last_part(pair.producer)}{form} → {consumers}")
    return f"| {arch} | {'<br>'.join(rescaled)} | {'<br>'.join(left)} |"


def main() -> None:
    """Print the page."""
    print(HEAD)
    for arch in ARCHITECTURES:
        print(table_row(arch))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


if __name__ == "__main__":
    main()
