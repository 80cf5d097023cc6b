"""The Triton kernel without a GPU: its launch configurations, its refusals, and the tests in the interpreter."""

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

from llmq.bench.kernels import limits, machine_code
from llmq.errors import LlmqError
from llmq.kernels import wna16
from llmq.kernels.launch import Device, Launch, TunedLaunch, bucket, configure, form_of, nearest, table_of
from llmq.kernels.problem import Problem
from llmq.kernels.registry import choose
from tests.interpreter import in_the_interpreter

ROOT = Path(__file__).resolve().parent.parent
F16 = torch.float16
H200 = Device("sm_90", 132)
PROBLEM = Problem(128, 256, 4, 64, True, F16, F16, "cpu")
missing = importlib.util.find_spec("triton") is None


def run_compiling(code: str) -> None:
    """Run code in a process whose Triton compiles, even if this process interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.skipif(missing, reason="triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    in_the_interpreter(*(f"tests/interpreted_{name}.py" for name in ("wna16", "grouped", "dequant", "tuning")))


@pytest.mark.skipif(missing, reason="triton is not installed")
def test_machine_code_is_within_limits() -> None:
    """Two of the launches that `scripts/check_kernels.py` compiles."""
    code = """
import triton
from llmq.bench.kernels.machine_code import MatmulCase, read
from llmq.bench.kernels.limits import failures
from llmq.kernels.launch import Launch
for form in ("assembly", "portable"):
    case = MatmulCase("sm_90", "fp16", 128, True, Launch(16, 64, 4, 4, 4, form))
    code = read(case)
    failed = failures(case, code, ".".join(triton.__version__.split(".")[:2]))
    assert not failed, (case, code, failed)
"""
    run_compiling(code)


def test_limits_only_fall_and_failures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = limits.case_of("sm_90", "fp16", 128, True, 16, 64)
    good = machine_code.MachineCode(95, 0, 29056, "HGMMA", 2.5, 2, 0, 0)
    monkeypatch.setattr(limits, "LIMITS", tmp_path / "limits.json")
    for reached in (2.7, 2.5, 2.9):
        limits._limits.cache_clear()
        limits.lower_limits([(case, replace(good, per_weight=reached))], "3.9")
    limits._limits.cache_clear()
    assert limits.most_per_weight(case, "3.9") == 2.53
    assert limits.most_per_weight(case, "3.7") == 3.0, "the design's limit for a version that was never measured"
    assert limits.failures(case, good, "3.9") == []
    bad = machine_code.MachineCode(255, 8, 1 << 20, "HMMA", 2.54, 3, 1, 4)
    assert limits.failures(case, bad, "3.9") == [
        "stack 8",
        "smem 1048576 > 227 KB",
        "4 integer conversions",
        "no HGMMA: HMMA",
        "3 narrow loads > 2",
        "1 stores to shared memory",
        "2.54 instructions per weight > 2.53",
    ]
    limits._limits.cache_clear()


def test_launches_of_measured_tables_are_compiled_too(tmp_path: Path) -> None:
    assert limits.tuned_cases("sm_90", tmp_path) == []
    rows = [TunedLaunch("bfloat16", 128, 16, n, 4096, 64, 8, 5, 2) for n in (4096, 8192)]
    stored = {"arch": "sm_90", "processors": 132, "device": "none", "rows": [vars(row) for row in rows]}
    (tmp_path / "none.json").write_text(json.dumps(stored))
    launch = Launch(16, 64, 8, 5, 2, "assembly")
    assert limits.tuned_cases("sm_90", tmp_path) == [
        machine_code.MatmulCase("sm_90", "bf16", 128, symmetric, launch) for symmetric in (True, False)
    ]
    assert limits.tuned_cases("sm_80", tmp_path) == []


@pytest.mark.skipif(missing, reason="triton is not installed")
def test_the_interpreter_must_be_on_before_triton_is_imported() -> None:
    code = """
import os
from llmq.kernels import wna16
import triton
os.environ["TRITON_INTERPRET"] = "1"
assert not wna16.interpreting()
"""
    run_compiling(code)


def test_other_kernels_work_without_triton() -> None:
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
            "requires a GPU; the weight is on cpu (set TRITON_INTERPRET=1 before importing triton to use its interpreter)",
        ),
        ({"device": "mps"}, "requires a CUDA or ROCm device; the weight is on mps"),
        ({"device": "cuda", "offloaded": True}, "the weight is offloaded"),
        ({"device": "cuda", "dtype": torch.float32}, "requires float16 or bfloat16 input; got float32"),
        ({"device": "cuda", "scale_dtype": torch.float32}, "requires float16 or bfloat16 scales; got float32"),
        ({"device": "cuda", "group_size": 16}, "or one group per channel; got 16"),
        ({"device": "cuda", "bits": 2}, "requires 4 or 8 bits; got 2"),
    ],
)
def test_refusals_state_rule_and_value(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "_installed", lambda: True)
    monkeypatch.setattr(wna16, "_min_capability", lambda: (9, 0))
    refusal = wna16.refusal(replace(PROBLEM, **change))
    assert refusal is not None
    assert reason in refusal


def test_old_gpus_and_a_missing_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "_installed", lambda: True)
    monkeypatch.setattr(wna16, "_min_capability", lambda: (9, 0))
    problem = replace(PROBLEM, device="cuda")
    assert choose(problem, 1).kernel is wna16.KERNEL
    assert choose(problem, wna16.MAX_ROWS + 1).kernel.name == "slab"
    monkeypatch.setattr(wna16, "_min_capability", lambda: (7, 5))
    assert wna16.refusal(problem) == "requires sm_80 or newer; the oldest GPU here is sm_75"
    monkeypatch.setattr(wna16, "_installed", lambda: False)
    with pytest.raises(
        LlmqError, match="triton requires the package triton, which is not installed: pip install triton"
    ):
        choose(problem, 1, "triton")


def test_rows_fall_into_buckets() -> None:
    assert [bucket("sm_80", rows) for rows in (1, 8, 9, 16, 33, 64, 65, 4096)] == [8, 8, 16, 16, 64, 64, 64, 64]
    assert [bucket("sm_90", rows) for rows in (64, 65, 128, 256)] == [64, 128, 128, 128]
    with pytest.raises(ValueError, match="a launch needs at least 1 row of x; got 0"):
        configure(H200, "float16", 128, 0, 64, 128)


def test_rules_fill_the_processors() -> None:
    assert configure(H200, "float16", 128, 1, 4096, 4096) == Launch(8, 64, 4, 4, 8, "assembly")
    assert configure(H200, "float16", 128, 1, 28672, 8192) == Launch(8, 128, 4, 4, 2, "assembly")
    assert configure(H200, "bfloat16", 128, 64, 151936, 4096) == Launch(64, 128, 4, 4, 1, "assembly")
    assert configure(H200, "float16", 128, 128, 4096, 4096) == Launch(128, 128, 8, 4, 8, "assembly")
    assert configure(Device("sm_80", 108), "float16", 128, 128, 4096, 4096) == Launch(64, 128, 8, 4, 4, "assembly")
    assert configure(Device("sm_100", 148), "float16", 128, 1, 4096, 4096) == Launch(8, 128, 4, 4, 8, "assembly")
    assert configure(Device("gfx1100", 96), "float16", 128, 64, 4096, 4096) == Launch(64, 128, 16, 2, 8, "portable")
    assert configure(H200, "float16", 128, 64, 4160, 4096).bn == 64, "65 row tiles do not pair up"
    for n in range(1, 700, 63):
        for k in (1, 128, 1000, 14336):
            for rows in (1, 64, 200):
                made = configure(H200, "float16", 0, rows, n, k)
                assert -(-n // 64) % (made.bn // 64) == 0, "a block stays within the padded rows"
                assert made.split <= -(-k // 128), "every part of K has a tile"


def test_forms_follow_the_vendor() -> None:
    assert form_of("sm_80", "bfloat16") == "assembly"
    assert form_of("gfx942", "bfloat16") == "portable"
    assert form_of("interpreter", "float16") == "portable"
    assert form_of("interpreter", "bfloat16") == "upcast"


def test_the_nearest_measured_row_decides(tmp_path: Path) -> None:
    rows = [TunedLaunch("float16", 128, 8, n, k, bn, 4, 3, 5) for n, k, bn in ((4096, 4096, 64), (8192, 8192, 128))]
    stored = {"arch": "sm_90", "processors": 132, "device": "none", "measured": "never"}
    listed = [{**vars(row), "us": 1.0} for row in rows]
    (tmp_path / "none.json").write_text(json.dumps(stored | {"rows": listed}))
    table = table_of(H200, tmp_path)
    assert table == tuple(rows)
    assert table_of(Device("sm_90", 114), tmp_path) == ()
    assert nearest(table, "float16", 128, 8, 4096, 8192) == rows[1], "the larger of two equally near rows"
    assert nearest(table, "float16", 128, 8, 4160, 8192) == rows[0], "65 row tiles do not divide into blocks of 128"
    assert nearest(table, "float16", 128, 8, 100_000, 8192) is None, "too far away"
    assert nearest(table, "float16", 128, 8, 4096, 512) is None
    assert nearest(table, "bfloat16", 128, 8, 4096, 4096) is None
    assert configure(H200, "float16", 128, 3, 4096, 4000, table) == Launch(8, 64, 4, 3, 5, "assembly")


def test_a_device_prefers_its_own_table_over_that_of_its_architecture(tmp_path: Path) -> None:
    for name, warps in (("NVIDIA H100", 4), ("NVIDIA H200", 8)):
        row = vars(TunedLaunch("float16", 128, 8, 4096, 4096, 64, warps, 3, 1)) | {"us": 1.0}
        stored = {"arch": "sm_90", "processors": 132, "device": name, "measured": "never", "rows": [row]}
        (tmp_path / f"{warps}.json").write_text(json.dumps(stored))
    for name, warps in (("NVIDIA H100", 4), ("NVIDIA H200", 8), ("NVIDIA GH200", 4)):
        assert table_of(Device("sm_90", 132, name), tmp_path)[0].warps == warps
