"""Timings in turns, inside a time box: a machine whose speed drifts favours none of the compared runs.

    round 0   group 1: a a b b c c   group 2: a a b b c c   ...    the first of each pair is a warm-up, not counted
    round 1   group 1: c b a         group 2: c b a
    round 2   group 1: a b c ...

The runs of a group are compared with each other, so a group is measured completely or not at all; its order is reversed from
round to round. A group starts only if it would end in time, judged by its last round. A group that never starts has no
timings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

Run = Callable[[], float]
"""Run the measured work once; return the seconds to count."""


def in_turns(
    groups: Sequence[Sequence[Run]], seconds: float, rounds: int, now: Callable[[], float] = time.perf_counter
) -> list[list[list[float]]]:
    """The timings of each run of each group: at most `rounds` of each, within `seconds` in total."""
    end = now() + seconds
    timings: list[list[list[float]]] = [[[] for _ in group] for group in groups]
    durations = [0.0] * len(groups)
    for turn in range(rounds):
        for index, group in enumerate(groups):
            began = now()
            if began + durations[index] >= end:
                continue
            order = range(len(group)) if turn % 2 == 0 else reversed(range(len(group)))
            for place in order:
                if not timings[index][place]:
                    group[place]()
                timings[index][place].append(group[place]())
            durations[index] = now() - began
    return timings
