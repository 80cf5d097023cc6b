"""Print docs/pairs.md: which rescalable pairs are found in each tested architecture, and which groups have none.

Run from the root of a clone: `python scripts/pairs_table.py > docs/pairs.md`. The models are the tests' tiny ones: what is
found depends on the architecture's code, not on its size.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Pairs that AWQ may rescale

Found by running one block and proven by a probe (`llmq/transforms/pairs.py`); made by `python scripts/pairs_table.py`.
A scale moves from the producer's channels to the consumers' columns.

| architecture | producer → consumers | not rescaled |
|---|---|---|"""


def row(arch: str) -> str:
    """One line of the table."""
    from llmq.transforms.pairs import NoPair, find_pairs
    from tests.tiny import taken_apart

    found, missing = [], []
    for pair in find_pairs(*taken_apart(arch)).pairs:
        consumers = " ".join(_short(name) for name in pair.consumers)
        if isinstance(pair, NoPair):
            missing.append(f"{consumers}: {pair.reason}")
        else:
            form = {"one_plus": " (1 + w)"}.get(pair.form, "")
            found.append(f"{_short(pair.producer)}{form} → {consumers}")
    return f"| {arch} | {'<br>'.join(found)} | {'<br>'.join(missing)} |"


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def main() -> None:
    from tests.tiny import ARCHITECTURES

    print(HEAD)
    for arch in ARCHITECTURES:
        print(row(arch))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
