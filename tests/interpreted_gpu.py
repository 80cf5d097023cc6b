"""The checks of `test_gpu.py` with the Triton kernel in its interpreter on the CPU. Run by `test_gpu_checks.py`.

The checks with threads are left out: the interpreter is not thread-safe.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmq.bench.kernels import checking
from tests import gpu_checks

F16 = torch.float16


def test_kernel_cases() -> None:
    listed = [case for case in checking.cases(small=True) if case.dtype == "float16" and case.bits == 4]
    for case in (listed[0], listed[-1]):
        few = replace(case, rows=(0, 1, 9))
        gpu_checks.assert_case_right(few, "cpu", {"slab", "triton"}, repeats=2)


@pytest.mark.parametrize("bits", [3, 4])
def test_dequantized_rows(bits: int) -> None:
    gpu_checks.assert_dequantized_bits(bits, False, torch.bfloat16, F16, "cpu", (33, 1056, 48))


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "NEW", 2)
    monkeypatch.setattr(gpu_checks, "IDS", gpu_checks.IDS[:, :4])
    folder = gpu_checks.make_checkpoint(tmp_path / "out", 4, True, "float16")
    gpu_checks.assert_graph_equals_eager(folder, "cpu", "triton", True)
