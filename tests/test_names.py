"""Joined names stand for exactly the names that they were made of."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from llmq.names import compact_names, first_names


def expanded(joined: str) -> list[str]:
    """Every name that a joined name stands for."""
    choices: list[list[str]] = []
    for fixed, ranges in re.findall(r"([^{}]+)|\{([^}]*)\}", joined):
        if fixed:
            choices.append([fixed])
            continue
        choices.append([])
        for run in ranges.split(", "):
            first, dash, last = run.partition("-")
            choices[-1] += map(str, range(int(first), int(last) + 1)) if dash else [run]
    return ["".join(parts) for parts in itertools.product(*choices)]


NAMES = st.lists(
    st.lists(st.sampled_from(["layers", "up", "0", "1", "2", "3", "11"]), min_size=1, max_size=4).map(".".join),
    unique=True,
)


@given(NAMES)
def test_joined_names_expand_to_the_original_names(names: list[str]) -> None:
    assert sorted(itertools.chain.from_iterable(map(expanded, compact_names(names)))) == sorted(names)


def test_consecutive_indices_and_full_combinations_are_joined() -> None:
    layers = [f"model.layers.{layer}.up" for layer in (2, 0, 1, 7)]
    experts = [f"experts.{layer}.{expert}.down" for layer in range(3) for expert in range(8)]
    assert compact_names(["lm_head", *layers, *experts]) == [
        "lm_head",
        "model.layers.{0-2, 7}.up",
        "experts.{0-2}.{0-7}.down",
    ]
    assert compact_names(["a.0.1", "a.1.0"]) == ["a.0.1", "a.1.0"]


def test_siblings_are_joined() -> None:
    names = [f"layers.{layer}.mlp.{kind}" for layer in (0, 1) for kind in ("gate", "up")]
    assert compact_names([*names, "layers.0.norm", "layers.3", "lm_head", "norm"]) == [
        "layers.{0-1}.mlp.{gate, up}",
        "layers.0.norm",
        "layers.3",
        "lm_head",
        "norm",
    ]


def test_the_first_names_and_how_many_more() -> None:
    assert first_names(["a", "b"], 2) == "a, b"
    assert first_names(["a", "b", "c"], 2) == "a, b and 1 more"
