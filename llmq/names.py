"""Names of modules and tensors, told shortly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def compact_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in indices, then in the last part, as one: `layers.{0-2, 5}.mlp.{gate_proj, up_proj}`.

    Where several indices differ (of layers and experts), only if every combination of them is there: else each name.
    They come in the order of the first of each.
    """
    alike: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for name in names:
        parts = name.split(".")
        pattern = tuple("" if part.isdecimal() else part for part in parts)
        alike.setdefault(pattern, {})[tuple(int(part) for part in parts if part.isdecimal())] = name
    told: list[str] = []
    for pattern, found in alike.items():
        places = [sorted(set(numbers)) for numbers in zip(*found, strict=True)]
        if math.prod(map(len, places)) == len(found):
            numbers = iter(map(_ranges, places))
            told.append(".".join(part or next(numbers) for part in pattern))
        else:
            told += found.values()
    return _siblings(told)


def _siblings(names: Iterable[str]) -> list[str]:
    """Names with the last parts of one parent told together."""
    children: dict[str, list[str]] = {}
    for name in names:
        parent, dot, last = name.rpartition(".")
        plain = parent and "{" not in last
        children.setdefault(parent + dot if plain else name, []).append(last if plain else "")
    return [parent + (last[0] if len(last) == 1 else f"{{{', '.join(last)}}}") for parent, last in children.items()]


def first_names(names: Sequence[str], most: int = 3) -> str:
    """The first `most` of the names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers: "7", "{0-3, 7}"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return told if len(numbers) == 1 else f"{{{told}}}"
