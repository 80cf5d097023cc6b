"""Files of at most 300 lines and functions of at most 50, or a reason in the docstring: `(Over 50 lines: ...)`.

Complexity, the number of statements and public docstrings are ruff's (pyproject.toml). Test modules are not counted.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("llmq", "kernels", "eval", "scripts")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
FILE_LINES, FUNCTION_LINES = 300, 50


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short_or_say_why_not(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.count("\n")
    assert lines <= FILE_LINES or f"(Over {FILE_LINES} lines:" in (ast.get_docstring(tree) or ""), f"{lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            reason = f"(Over {FUNCTION_LINES} lines:" in (ast.get_docstring(node) or "")
            assert lines <= FUNCTION_LINES or reason, f"{node.name} has {lines} lines"
