"""Timings in turns, inside a box of time: a machine whose speed drifts favours none of those that are compared.

    round 0   group 1: a a b b c c   group 2: a a b b c c   ...    the first of each pair is not counted
    round 1   group 1: c b a         group 2: c b a
    round 2   group 1: a b c ...

Those of a group are compared with each other, so a group is measured whole or not at all; its order turns around from
round to round. A group begins only where, by its last round, it ends in time; what never began has no timings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

Run = Callable[[], float]
"""Does what is measured once; returns the seconds that count."""


def in_turns(
    groups: Sequence[Sequence[Run]], seconds: float, rounds: int, now: Callable[[], float] = time.perf_counter
) -> list[list[list[float]]]:
    """The timings of each run of each group, at most `rounds` of each, in `seconds` in all."""
    end = now() + seconds
    found: list[list[list[float]]] = [[[] for _ in group] for group in groups]
    lasted = [0.0] * len(groups)
    for turn in range(rounds):
        for index, group in enumerate(groups):
            began = now()
            if began + lasted[index] >= end:
                continue
            order = range(len(group)) if turn % 2 == 0 else reversed(range(len(group)))
            for place in order:
                if not found[index][place]:
                    group[place]()
                found[index][place].append(group[place]())
            lasted[index] = now() - began
    return found
