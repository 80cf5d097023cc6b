"""Print docs/pairs.md: which rescalable pairs are found in each tested architecture, and which groups have none.

Run from the root of a clone: `python scripts/pairs_table.py > docs/pairs.md`. The models are the tests' tiny ones: what is
found depends on the architecture's code, not on its size.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Pairs that AWQ may rescale

Found by running one block and proven by a probe (`llmq/pairs.py`); made by `python scripts/pairs_table.py`.
A scale moves from the producer's channels to the consumers' columns.

| architecture | producer → consumers | not rescaled |
|---|---|---|"""


def row(arch: str) -> str:
    """One line of the table."""
    from llmq.blocks import capture, find_blocks
    from llmq.pairs import NoPair, find_pairs
    from llmq.topology import input_groups, linears
    from tests.tiny import tiny_model

    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    ids = torch.arange(3, 19)[None]
    captured = capture(model, lambda batch: model.base_model(input_ids=batch, use_cache=False), [ids])
    call, hidden = captured.calls[0][0], captured.hidden[0]
    groups = input_groups(blocks[0], call, hidden, list(linears(blocks[0])))
    found, missing = [], []
    for pair in find_pairs(blocks[0], call, hidden, groups):
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
