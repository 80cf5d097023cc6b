"""Arrows point down only: every import inside the project against one table of allowed edges."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# layer -> layers that it may import; those in `OPEN` are open to all. Not listed: torch; transformers is hf's.
EDGES: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "names": set(),
    "config": set(),
    "core": set(),
    "kernels": {"core"},
    "eval": set(),
    "methods": {"core"},
    "formats": {"core"},
    "blocks": set(),
    "walk": {"blocks"},
    "statistics": set(),
    "topology": {"blocks"},
    "heldout": {"core", "methods", "statistics"},
    "calibration": {"eval"},
    "demo": set(),
    "plan": {"blocks", "core", "formats"},
    "twin": {"blocks"},
    "pairs": {"blocks", "twin"},
    "transforms": {"core", "methods", "pairs", "statistics"},
    "blockwork": {
        *("blocks", "core", "heldout", "methods", "pairs", "plan", "statistics"),
        *("topology", "transforms", "walk"),
    },
    "pipeline": {"blocks", "blockwork", "core", "pairs", "plan", "transforms"},
    "checkpoint": {"core", "formats"},
    "linear": {"kernels", "formats", "core"},
    "joined": {"kernels", "core", "linear"},
    "launches": {"kernels", "joined", "linear"},
    "hf": {"joined", "linear", "checkpoint", "formats", "blocks", "core", "demo"},
    "report": {"blockwork", "transforms"},
    "sizing": {"walk", "formats", "heldout", "plan", "report", "hf"},
    "api": {
        *("blocks", "calibration", "checkpoint", "core", "eval", "formats", "heldout", "hf"),
        *("blockwork", "pipeline", "plan", "sizing", "report", "transforms"),
    },
    "evaluation": {"api", "calibration", "eval", "hf"},
    "bench": {
        "core",
        *("api", "blocks", "eval", "evaluation", "hf", "joined", "kernels", "launches", "linear", "methods"),
        *("plan", "report"),
    },
    "console": {"blockwork", "eval", "pipeline", "sizing", "report", "transforms"},
    "progress": {"calibration", "console", "pipeline", "report"},
    "cli": {"api", "console", "demo", "evaluation", "hf", "progress"},
    "__init__": {"api", "hf", "launches"},
}
OPEN = {"errors", "config", "names", "_version"}
HEAVY = {"transformers": {"hf", "evaluation"}, "datasets": {"eval"}, "triton": {"kernels"}}


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, layer in ((ROOT / "kernels", "kernels"), (ROOT / "eval", "eval")):
        found += [(layer, file) for file in sorted(folder.glob("*.py"))]
    for file in sorted((ROOT / "llmq").rglob("*.py")):
        parts = file.relative_to(ROOT / "llmq").with_suffix("").parts
        if parts[0] not in ("kernels", "eval"):
            found.append((parts[0], file))
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


@pytest.mark.parametrize(("layer", "file"), modules(), ids=lambda value: getattr(value, "stem", value))
def test_imports_follow_the_table(layer: str, file: Path) -> None:
    for name in imported(file):
        root, _, rest = name.partition(".")
        if root == "llmq":
            target = rest.split(".")[0]
            allowed = EDGES[layer] | OPEN | {layer}
            assert target in allowed or target not in EDGES, f"{layer} may not import llmq.{target}"
        elif root in HEAVY:
            assert layer in HEAVY[root], f"{layer} may not import {root}"
