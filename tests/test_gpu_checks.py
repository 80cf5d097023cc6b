"""The checks of `test_gpu.py` on the CPU: with its own kernels, with Triton's interpreter, and with wrong kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmq.bench.kernels import checking
from llmq.kernels import slab
from llmq.serving.linear import QuantLinear
from tests import gpu_checks
from tests.fixtures import with_run
from tests.interpreter import in_the_interpreter

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_checks.make_checkpoint(tmp_path_factory.mktemp("tiny") / "out", 4, False, "float16")


def test_cases_cover_every_size_that_the_gpu_must_run() -> None:
    listed = checking.cases(small=False)
    assert {case.group for case in listed} == set(checking.GROUPS)
    assert {case.dtype for case in listed} == {"float16", "bfloat16"}
    assert {case.symmetric for case in listed} == {True, False}
    assert {case.bits for case in listed} == {2, 3, 4, 8}
    assert {0, 1, 1024} <= {rows for case in listed for rows in case.rows}
    assert any(case.graphs for case in listed)


@pytest.mark.parametrize("case", checking.cases(small=True), ids=str)
def test_kernel_cases(case: checking.KernelCase) -> None:
    gpu_checks.assert_case_right(case, "cpu", {"slab"}, repeats=3)


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    case = replace(checking.cases(small=True)[0], rows=(3,))
    wrong = with_run(lambda kernel: lambda x, runtime, bias=None: kernel.run(x, runtime, bias) * 1.1)
    monkeypatch.setattr(checking, "KERNELS", wrong)
    with pytest.raises(AssertionError, match="has a relative error of"):
        gpu_checks.assert_case_right(case, "cpu", {"slab"})
    with pytest.raises(AssertionError, match="expected \\['triton'\\], got"):
        gpu_checks.assert_case_right(case, "cpu", {"triton"})
    only_slab = with_run(
        lambda kernel: (
            (lambda x, runtime, bias=None: slab.run(x, runtime, bias) * 1.1) if kernel is slab.KERNEL else kernel.run
        )
    )
    monkeypatch.setattr(QuantLinear, "kernels", only_slab)
    with pytest.raises(AssertionError, match="logits differ by"):
        gpu_checks.assert_model_equals_reference(folder, "cpu", "slab", False)


def test_models(folder: Path) -> None:
    gpu_checks.assert_model_equals_reference(folder, "cpu", "slab", False)
    gpu_checks.assert_graph_equals_eager(folder, "cpu", "slab", False)
    gpu_checks.assert_model_in_threads(folder, "cpu", "slab", False)


def test_fused_models(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("cpu_int4, the only CPU kernel that supports fusion, requires AVX2 or AVX512")
    made = gpu_checks.make_checkpoint(tmp_path / "out", 4, True, "bfloat16")
    gpu_checks.assert_model_equals_reference(made, "cpu", "cpu_int4", True)
    gpu_checks.assert_graph_equals_eager(made, "cpu", "cpu_int4", True)
    gpu_checks.assert_model_in_threads(made, "cpu", "cpu_int4", True)


def test_different_tokens_fail(folder: Path) -> None:
    model = gpu_checks.loaded(folder, "slab", "cpu")
    expected = gpu_checks.generated(model, gpu_checks.IDS)
    other = expected.clone()
    other[1, 15] = (other[1, 15] + 1) % 128
    with pytest.raises(AssertionError, match="sequence 1, position 15: logits differ by"):
        gpu_checks.assert_same_tokens(model, expected, other, 1e-6)
    gpu_checks.assert_same_tokens(model, expected, other, 1e6)


def test_threads() -> None:
    gpu_checks.assert_threads_do_not_interfere("cpu", "slab", torch.float16, 5)
    gpu_checks.assert_graphs_do_not_interfere("cpu", "slab", torch.float16, 5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_in_the_interpreter() -> None:
    in_the_interpreter("tests/interpreted_gpu.py")


def test_without_a_gpu_every_test_is_skipped_with_a_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch finds no CUDA device" in done.stdout
    assert " skipped" in done.stdout.splitlines()[-1]
    assert " passed" not in done.stdout
