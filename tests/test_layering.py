"""Arrows point down only: every import inside the project against one table, without a missing, an unused or a circular edge."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room -> rooms that it imports; those in `OPEN` may be imported from anywhere and are not listed.
EDGES: dict[str, set[str]] = {
    "core": set(),
    "kernels": {"core"},
    "eval": set(),
    "demo": set(),
    "methods": {"blocks", "core"},
    "formats": {"core"},
    "blocks": set(),
    "calibration": {"eval"},
    "transforms": {"blocks", "core", "methods"},
    "checkpoint": {"formats"},
    "serving": {"core", "formats", "kernels"},
    "hf": {"blocks", "calibration", "checkpoint", "core", "eval", "formats", "serving"},
    "quantization": {"blocks", "core", "formats", "methods", "transforms"},
    "report": {"checkpoint", "quantization", "transforms"},
    "api": {"blocks", "calibration", "checkpoint", "hf", "quantization", "report", "transforms"},
    "evaluation": {"api", "calibration", "eval", "hf"},
    "bench": {"api", "blocks", "core", "eval", "hf", "kernels", "methods", "quantization", "report", "serving"},
    "cli": {"api", "calibration", "demo", "eval", "evaluation", "quantization", "report", "transforms"},
    "__init__": {"api", "hf", "serving"},
}
OPEN = {"errors", "config", "memory", "names", "_version"}
HEAVY = {"transformers": {"hf", "bench"}, "datasets": {"eval"}, "triton": {"kernels", "bench"}}
"""Heavy packages -> the rooms that may import them."""


def files_of_rooms() -> list[tuple[str, Path]]:
    found = []
    for folder in ("kernels", "eval"):
        found += [(folder, file) for file in sorted((ROOT / folder).glob("*.py"))]
    for file in sorted((ROOT / "llmq").rglob("*.py")):
        room = file.relative_to(ROOT / "llmq").with_suffix("").parts[0]
        if room not in ("kernels", "eval"):
            found.append((room, file))
    return found


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_used(room: str, file: Path) -> set[str]:
    """The rooms that a file imports from, its own left out."""
    inside = {name.split(".")[1] for name in imported(file) if name.startswith("llmq.")}
    return inside - {room}


@pytest.mark.parametrize(("room", "file"), files_of_rooms(), ids=lambda value: getattr(value, "stem", value))
def test_imports_follow_the_table(room: str, file: Path) -> None:
    allowed = OPEN if room in OPEN else EDGES[room] | OPEN
    assert rooms_used(room, file) <= allowed
    for name in imported(file):
        package = name.partition(".")[0]
        assert room in HEAVY.get(package, {room}), f"{room} may not import {package}"


def test_formats_are_used_through_their_interface() -> None:
    """Only llmq/formats and a format's own test may import the module of one format."""
    interface = {"llmq.formats", "llmq.formats.base"}
    formats = {f"llmq.formats.{file.stem}" for file in (ROOT / "llmq" / "formats").glob("*.py")} - interface
    formats.discard("llmq.formats.__init__")
    assert formats
    for folder in ("llmq", "kernels", "eval", "scripts", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            own = {f"llmq.formats.{file.stem.removeprefix('test_')}"} if folder == "tests" else set()
            if file.parent != ROOT / "llmq" / "formats":
                modules = {name for each in imported(file) for name in (each, each.rpartition(".")[0])}
                assert not modules & formats - own, file


def test_every_edge_is_used() -> None:
    used: dict[str, set[str]] = {room: set() for room in EDGES}
    for room, file in files_of_rooms():
        used.setdefault(room, set()).update(rooms_used(room, file) - OPEN)
    assert {room: found for room, found in used.items() if room not in OPEN} == EDGES


def test_rooms_form_no_circle() -> None:
    TopologicalSorter(EDGES).prepare()  # raises CycleError
