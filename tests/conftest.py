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
