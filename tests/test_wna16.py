"""The Triton kernel without a GPU: its launch configurations, what it refuses, and the interpreter's tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.bench.kernels import gates, machine_code
from llmq.errors import LlmqError
from llmq.kernels import wna16
from llmq.kernels.launch import Device, Launch, Row, bucket, configure, form_of, nearest, table_of
from llmq.kernels.problem import Problem
from llmq.kernels.registry import choose
from tests.interpreter import in_the_interpreter

ROOT = Path(__file__).resolve().parent.parent
F16 = torch.float16
H200 = Device("sm_90", 132)
PROBLEM = Problem(128, 256, 4, 64, True, F16, F16, "cpu")
absent = importlib.util.find_spec("triton") is None


def run_compiling(code: str) -> None:
    """Run code in a process whose Triton compiles, whatever this one's does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.skipif(absent, reason="triton is not installed")
def test_the_kernels_in_the_interpreter() -> None:
    in_the_interpreter(*(f"tests/interpreted_{name}.py" for name in ("wna16", "dequant", "tuning")))


@pytest.mark.skipif(absent, reason="triton is not installed")
def test_machine_code_is_what_was_designed() -> None:
    """Two launches of `scripts/check_kernels.py`, which compiles all of them."""
    code = """
import triton
from llmq.bench.kernels.machine_code import Case, read
from llmq.bench.kernels.gates import failures
from llmq.kernels.launch import Launch
for form in ("assembly", "portable"):
    case = Case("sm_90", "fp16", 128, True, Launch(16, 64, 4, 4, 4, form))
    report = read(case)
    failed = failures(case, report, ".".join(triton.__version__.split(".")[:2]))
    assert not failed, (case, report, failed)
"""
    run_compiling(code)


def test_limits_fall_and_failures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gates.case_of("sm_90", "fp16", 128, True, 16, 64)
    good = machine_code.Report(95, 0, 29056, "HGMMA", 2.5, 2, 0, 0)
    monkeypatch.setattr(gates, "LIMITS", tmp_path / "limits.json")
    for reached in (2.7, 2.5, 2.9):
        gates._limits.cache_clear()
        gates.ratchet([(case, replace(good, per_weight=reached))], "3.9")
    gates._limits.cache_clear()
    assert gates.most_per_weight(case, "3.9") == 2.53
    assert gates.most_per_weight(case, "3.7") == 3.0, "the design's, where a version was never measured"
    assert gates.failures(case, good, "3.9") == []
    bad = machine_code.Report(255, 8, 1 << 20, "HMMA", 2.54, 3, 1, 4)
    assert gates.failures(case, bad, "3.9") == [
        *("stack 8", "smem 1048576 > 227 KB", "4 conversions of integers", "no HGMMA: HMMA"),
        *("3 narrow loads > 2", "1 stores to shared memory", "2.54 instructions a weight > 2.53"),
    ]
    gates._limits.cache_clear()


def test_what_measured_tables_launch_is_compiled_too(tmp_path: Path) -> None:
    assert gates.tuned_cases("sm_90", tmp_path) == []
    rows = [Row("bfloat16", 128, 16, n, 4096, 64, 8, 5, 2) for n in (4096, 8192)]
    stored = {"arch": "sm_90", "processors": 132, "device": "none", "rows": [vars(row) for row in rows]}
    (tmp_path / "none.json").write_text(json.dumps(stored))
    launch = Launch(16, 64, 8, 5, 2, "assembly")
    assert gates.tuned_cases("sm_90", tmp_path) == [
        machine_code.Case("sm_90", "bf16", 128, symmetric, launch) for symmetric in (True, False)
    ]
    assert gates.tuned_cases("sm_80", tmp_path) == []


@pytest.mark.skipif(absent, reason="triton is not installed")
def test_an_interpreter_turned_on_too_late_is_off() -> None:
    code = """
import os
from llmq.kernels import wna16
import triton
os.environ["TRITON_INTERPRET"] = "1"
assert not wna16.interpreting()
"""
    run_compiling(code)


def test_everything_else_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # what makes `import triton` fail, and find_spec find nothing
import torch, llmq
from llmq.kernels.problem import Problem
from llmq.kernels.registry import choose
choice = choose(Problem(32, 64, 4, 32, True, torch.bfloat16, torch.bfloat16, "cpu"), 1)
assert "is not installed" in dict(choice.refused)["triton"], choice
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {},
            "runs on GPUs; the weight is on cpu, and Triton's interpreter is off (TRITON_INTERPRET=1 at the start: on)",
        ),
        ({"device": "mps"}, "runs on CUDA and ROCm devices; the weight is on mps"),
        ({"device": "cuda", "streamed": True}, "the weight is offloaded"),
        ({"device": "cuda", "dtype": torch.float32}, "takes float16 and bfloat16; input: float32"),
        ({"device": "cuda", "scale_dtype": torch.float32}, "takes scales in float16 or bfloat16; these are float32"),
        ({"device": "cuda", "group_size": 16}, "these have 16 columns"),
        ({"device": "cuda", "bits": 2}, "takes 4 and 8 bits; these weights have 2"),
    ],
)
def test_refusals_state_rule_and_value(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "_installed", lambda: True)
    monkeypatch.setattr(wna16, "_oldest", lambda: (9, 0))
    found = wna16.refusal(replace(PROBLEM, **change))
    assert found is not None
    assert reason in found


def test_old_gpus_and_an_absent_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "_installed", lambda: True)
    monkeypatch.setattr(wna16, "_oldest", lambda: (9, 0))
    problem = replace(PROBLEM, device="cuda")
    assert choose(problem, 1).kernel is wna16
    assert choose(problem, wna16.MOST_ROWS + 1).kernel.NAME == "slab"
    monkeypatch.setattr(wna16, "_oldest", lambda: (7, 5))
    assert wna16.refusal(problem) == "needs sm_80 or newer; the oldest GPU here is sm_75"
    monkeypatch.setattr(wna16, "_installed", lambda: False)
    with pytest.raises(LlmqError, match="triton needs the package triton, which is not installed: pip install triton"):
        choose(problem, 1, "triton")


def test_rows_fall_into_buckets() -> None:
    assert [bucket("sm_80", rows) for rows in (1, 8, 9, 16, 33, 64, 65, 4096)] == [8, 8, 16, 16, 64, 64, 64, 64]
    assert [bucket("sm_90", rows) for rows in (64, 65, 128, 256)] == [64, 128, 128, 128]
    with pytest.raises(ValueError, match="nothing to launch for 0 rows"):
        configure(H200, "float16", 128, 0, 64, 128)


def test_rules_fill_the_processors() -> None:
    assert configure(H200, "float16", 128, 1, 4096, 4096) == Launch(8, 64, 4, 4, 8, "assembly")
    assert configure(H200, "float16", 128, 1, 28672, 8192) == Launch(8, 128, 4, 4, 2, "assembly")
    assert configure(H200, "bfloat16", 128, 64, 151936, 4096) == Launch(64, 128, 4, 4, 1, "assembly")
    assert configure(H200, "float16", 128, 128, 4096, 4096) == Launch(128, 128, 8, 4, 8, "assembly")
    assert configure(Device("sm_80", 108), "float16", 128, 128, 4096, 4096) == Launch(64, 128, 8, 4, 4, "assembly")
    assert configure(Device("sm_100", 148), "float16", 128, 1, 4096, 4096) == Launch(8, 128, 4, 4, 8, "assembly")
    assert configure(Device("gfx1100", 96), "float16", 128, 64, 4096, 4096) == Launch(64, 128, 16, 2, 8, "portable")
    assert configure(H200, "float16", 128, 64, 4160, 4096).bn == 64, "65 tiles of rows have no blocks of two"
    for n in range(1, 700, 63):
        for k in (1, 128, 1000, 14336):
            for rows in (1, 64, 200):
                made = configure(H200, "float16", 0, rows, n, k)
                assert -(-n // 64) % (made.bn // 64) == 0, "a block never leaves the padded rows"
                assert made.split <= -(-k // 128), "and every part of K has a tile"


def test_forms_follow_the_vendor() -> None:
    assert form_of("sm_80", "bfloat16") == "assembly"
    assert form_of("gfx942", "bfloat16") == "portable"
    assert form_of("interpreter", "float16") == "portable"
    assert form_of("interpreter", "bfloat16") == "upcast"


def test_the_nearest_measured_row_decides(tmp_path: Path) -> None:
    rows = [Row("float16", 128, 8, n, k, bn, 4, 3, 5) for n, k, bn in ((4096, 4096, 64), (8192, 8192, 128))]
    stored = {"arch": "sm_90", "processors": 132, "device": "none", "measured": "by no one"}
    listed = [{**vars(row), "us": 1.0} for row in rows]
    (tmp_path / "none.json").write_text(json.dumps(stored | {"rows": listed}))
    table = table_of(H200, tmp_path)
    assert table == tuple(rows)
    assert table_of(Device("sm_90", 114), tmp_path) == ()
    assert nearest(table, "float16", 128, 8, 4096, 8192) == rows[1], "the larger of two as near"
    assert nearest(table, "float16", 128, 8, 4160, 8192) == rows[0], "65 row tiles have no blocks of 128"
    assert nearest(table, "float16", 128, 8, 100_000, 8192) is None, "too far"
    assert nearest(table, "float16", 128, 8, 4096, 512) is None
    assert nearest(table, "bfloat16", 128, 8, 4096, 4096) is None
    assert configure(H200, "float16", 128, 3, 4096, 4000, table) == Launch(8, 64, 4, 3, 5, "assembly")


def test_a_device_takes_its_own_table_before_a_twin_s(tmp_path: Path) -> None:
    for name, warps in (("NVIDIA H100", 4), ("NVIDIA H200", 8)):
        row = vars(Row("float16", 128, 8, 4096, 4096, 64, warps, 3, 1)) | {"us": 1.0}
        stored = {"arch": "sm_90", "processors": 132, "device": name, "measured": "by no one", "rows": [row]}
        (tmp_path / f"{warps}.json").write_text(json.dumps(stored))
    for name, warps in (("NVIDIA H100", 4), ("NVIDIA H200", 8), ("NVIDIA GH200", 4)):
        assert table_of(Device("sm_90", 132, name), tmp_path)[0].warps == warps
