"""Every test runs on the clone it lies in, with one torch thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llmq

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    found = Path(llmq.__file__).resolve().parent.parent
    if found != ROOT:
        raise pytest.UsageError(f"the tests of {ROOT} would test the llmq in {found}: run `pip install -e {ROOT}`")
    if not config.getoption("-m").startswith("slow"):
        torch.set_num_threads(1)


LONG = ("test_wna16.py::test_kernels_in_the_interpreter", "test_whole_models.py::test_tiny_models_in_the_interpreter")
"""Minutes each, in processes of their own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that no worker waits for another's at the end."""
    items.sort(key=lambda item: not item.nodeid.endswith(LONG))  # stable
