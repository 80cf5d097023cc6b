"""Short forms of lists of module and tensor names, for messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def compact_names(names: Iterable[str]) -> list[str]:
    """Joins names that differ only in indices, then those that differ only in the last part.

    The result looks like `layers.{0-2, 5}.mlp.{gate_proj, up_proj}`. Names in which several indices differ (of layers
    and experts) are joined only if every combination of the indices occurs. The order is that of first occurrence.
    """
    by_pattern: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for name in names:
        parts = name.split(".")
        pattern = tuple("" if part.isdecimal() else part for part in parts)
        by_pattern.setdefault(pattern, {})[tuple(int(part) for part in parts if part.isdecimal())] = name
    joined: list[str] = []
    for pattern, by_indices in by_pattern.items():
        indices = [sorted(set(numbers)) for numbers in zip(*by_indices, strict=True)]
        if math.prod(map(len, indices)) == len(by_indices):
            ranges = iter(map(_ranges, indices))
            joined.append(".".join(part or next(ranges) for part in pattern))
        else:
            joined += by_indices.values()
    return _join_siblings(joined)


def _join_siblings(names: Iterable[str]) -> list[str]:
    """Joins names that have the same parent: `mlp.{gate_proj, up_proj}`."""
    children: dict[str, list[str]] = {}
    for name in names:
        parent, dot, last = name.rpartition(".")
        plain = parent and "{" not in last
        children.setdefault(parent + dot if plain else name, []).append(last if plain else "")
    return [parent + (last[0] if len(last) == 1 else f"{{{', '.join(last)}}}") for parent, last in children.items()]


def first_names(names: Sequence[str], limit: int = 3) -> str:
    """The first `limit` names, and how many more there are: `a, b, c and 4 more`."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as `7` or `{0-3, 7}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
