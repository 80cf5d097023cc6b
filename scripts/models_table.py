"""Print docs/models.md: what is quantized of each model type that transformers knows, and whether it loads packed.

Usage: `python scripts/models_table.py > docs/models.md` (some minutes). The models are tiny and random: which linears there are,
and how they are stored, depends on the architecture's code, not on its size.
"""

from __future__ import annotations

import sys
from collections import Counter

from transformers.utils import logging

from llmq.bench.families import TOLERANCE, Family, measure, model_types

HEAD = """# Model types

Every causal language model type of transformers whose default config can be made small: random weights, quantized with
`{method}` in groups of 32, loaded packed, and compared with a model that holds the dequantized weights.
Made by `python scripts/models_table.py`.

*Quantized*: share of the parameters of the decoder blocks. *Stays*: what holds the other matrices of the blocks.
*Difference*: relative, of the logits of the packed model; float32 rounds by about 1e-6.

| type | kind | quantized | stays | difference | note |
|---|---|---|---|---|---|"""


def line(family: Family) -> str:
    """The line of the table for one type."""
    if family.share is None or family.difference is None:
        return f"| {family.name} | {family.kind} | refused | | | {family.note} |"
    stays = ", ".join(family.stays)
    return f"| {family.name} | {family.kind} | {family.share:.0%} | {stays} | {family.difference:.0e} | {family.note} |"


def main() -> None:
    """Print the page; the exit status is 1 where a packed model computes something else."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    method = sys.argv[1] if len(sys.argv) > 1 else "rtn"
    print(HEAD.format(method=method))
    counts: Counter[str] = Counter()
    for model_type in model_types():
        family = measure(model_type, method)
        if family is None:
            counts["not built"] += 1
            continue
        wrong = family.difference is not None and not family.difference <= TOLERANCE
        counts["wrong" if wrong else "refused" if family.share is None else "right"] += 1
        print(line(family), flush=True)
    print(
        f"\n{counts['right']} types right, {counts['wrong']} wrong, {counts['refused']} refused with the reason above; "
        f"{counts['not built']} have defaults that cannot be made small like this, and are not in the table."
    )
    raise SystemExit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
