"""The kernel benchmark on the CPU: wrong results are not timed, absent contenders are named, the record is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.bench import record
from llmq.bench.kernels import benchmark, checking, contenders, rivals, tables, timing, truth
from llmq.bench.kernels.benchmark import BenchResults
from llmq.bench.kernels.contenders import KernelBenchConfig, Shape
from llmq.bench.kernels.timing import SELF_TEST, Ceilings
from llmq.errors import LlmqError
from llmq.kernels import reference, slab
from llmq.kernels.kernel import Run
from tests.fixtures import with_run

ROOT = Path(__file__).resolve().parent.parent
F16, BF16 = torch.float16, torch.bfloat16
CPU = torch.device("cpu")
CONFIG = KernelBenchConfig(
    device=CPU,
    dtype=BF16,
    group_size=64,
    symmetric=False,
    shapes=(Shape(128, 64, "a layer"), Shape(256, 96)),
    rows=(1, 70),
    seconds=60.0,
    seed=5,
    effort=SELF_TEST,
)
LIMITS = Ceilings(1e9, 1e10)
KEYS = "bound bytes calls copies error flops k launch layer m n ours preferred roofline samples shape speedup spread us what"
NO_INT4 = "cpu_int4 and torch int4 require AVX2 or AVX512"
vectors = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason=NO_INT4)


def measured(config: KernelBenchConfig = CONFIG) -> BenchResults:
    results = BenchResults()
    benchmark.bench(config, LIMITS, results, lambda line: None)
    return results


def replace_slab(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """The slab kernel computes `run` in benchmarks and checks."""
    kernels = with_run(lambda kernel: run if kernel is slab.KERNEL else kernel.run)
    monkeypatch.setattr(contenders, "KERNELS", kernels)
    monkeypatch.setattr(checking, "KERNELS", kernels)


@vectors
def test_every_row_is_complete_and_absent_contenders_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    results = measured()
    assert json.loads(json.dumps(results.rows)) == results.rows
    assert {row["what"] for row in results.rows} == {"cpu_int4", "slab", "dense", "torch int4"}
    assert {"triton", "reference", "gemlite"} <= set(results.absent)
    assert results.absent["gemlite"] == "is not installed: pip install gemlite"
    assert (results.wrong, results.skipped) == ([], [])
    us = {(row["shape"], row["m"], row["what"]): row["us"] for row in results.rows}
    for row in results.rows:
        assert " ".join(sorted(row)) == KEYS
        assert row["copies"] == timing.MIN_COPIES
        assert 0 < row["error"] < truth.TOLERANCE[BF16]
        assert row["speedup"] == us[row["shape"], row["m"], "dense"] / row["us"]
        floor = max(row["bytes"] / LIMITS.copy, row["flops"] / LIMITS.flops) * 1e6
        assert row["roofline"] == pytest.approx(floor / row["us"])
    one = next(row for row in results.rows if (row["shape"], row["what"], row["m"]) == ("128x64", "cpu_int4", 1))
    # Codes, scales and zero points of 2 groups a row, x, y.
    assert one["bytes"] == 64 * 128 // 2 + 64 * 2 * 2 + 64 * 2 // 2 + 2 * (128 + 64)
    assert {(row["m"], row["what"]) for row in results.rows if row["preferred"]} == {(1, "cpu_int4"), (70, "slab")}


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_slab(monkeypatch, lambda x, packed, bias=None: slab.run(x, packed, bias) * (1.05 if len(x) == 70 else 1))
    results = measured()
    assert [line.partition(": ")[0] for line in results.wrong] == ["slab at 128x64", "slab at 256x96"]
    assert "the result for M=70 has a relative error of" in results.wrong[0]
    assert "slab" not in {row["what"] for row in results.rows}
    assert "dense" in {row["what"] for row in results.rows}


def test_a_kernel_that_is_not_deterministic_or_fails_later_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    count = [0]
    config = replace(CONFIG, shapes=CONFIG.shapes[:1], rows=(70,))

    def moving(x: Tensor, packed: Any, bias: Any = None) -> Tensor:
        count[0] += 1
        y = slab.run(x, packed, bias)
        y[0, 0] += count[0] * 2**-7
        return y

    def late(x: Tensor, packed: Any, bias: Any = None) -> Tensor:
        count[0] += 1
        return slab.run(x, packed, bias) * (1 if count[0] <= 2 else float("nan"))

    for broken, reason in ((moving, "is not bit-equal when repeated"), (late, "elements that are not finite")):
        count[0] = 0
        replace_slab(monkeypatch, broken)
        results = measured(config)
        assert len(results.wrong) == 1
        assert reason in results.wrong[0]
        assert "slab" not in {row["what"] for row in results.rows}


def test_a_rival_that_is_wrong_or_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(x: Tensor, runtime: Any) -> Tensor:
        raise NotImplementedError("not on this device\nsecond line")

    off = rivals.Rival("off", lambda problem: None, rivals.dense, lambda x, w: torch.nn.functional.linear(x, w * 1.1))
    bad = rivals.Rival("bad", lambda problem: None, rivals.dense, failing)
    monkeypatch.setattr(rivals, "RIVALS", (rivals.DENSE, off, bad))
    results = measured()
    assert not results.wrong, "a rival's failure is not ours"
    assert "the result for M=1 has a relative error of" in results.absent["off at 128x64"]
    assert results.absent["bad at 128x64"] == "NotImplementedError: not on this device"
    assert {row["what"] for row in results.rows}.isdisjoint({"off", "bad"})


def test_what_does_not_fit_the_time_box_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = measured(replace(CONFIG, seconds=0.0))
    assert (results.rows, results.skipped) == ([], ["128x64", "256x96"])
    monkeypatch.setattr(benchmark, "RIVAL_SHARE", 0.0)
    absent = measured(CONFIG).absent
    assert "dense at 256x96" not in absent, "without it there are no ratios"
    if "torch int4" not in absent:
        assert "its share of the time box" in absent["torch int4 at 256x96"]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(("columns", "size"), [(4096, 4096), (2048, 128), (160, 32)])
def test_rounding_passes_and_other_errors_do_not(columns: int, size: int, dtype: torch.dtype, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    packed = truth.draw(generator, 48, columns, size, symmetric, dtype)
    x = truth.draw_input(generator, 33, columns, dtype)
    expected = truth.truth(x, packed)
    y = slab.run(x, packed)
    assert truth.judge(y, expected).wrong is None, "each weight and y rounded once"
    assert truth.judge(y[:5], expected).wrong is None
    assert truth.judge(y[:0], expected).wrong is None
    lost, point = packed.scale.clone(), y.clone()
    lost[:, -1] = 0
    point[7, 9] += 16 * truth.TOLERANCE[dtype] * expected.size[7, 9]
    bad: list[tuple[Tensor, str]] = [
        (slab.run(x, replace(packed, scale=lost)), "has a relative error of"),
        (slab.run(torch.cat((x[:, : columns // 2], x[:, columns // 2 :] * 0), 1), packed), "has a relative error of"),
        (point, "has a wrong element [7, 9]"),
        (torch.where(torch.arange(48) == 3, float("nan"), y), "33 elements that are not finite, first at [0, 3]"),
        (y.float(), "is torch.float32"),
        (y[:, :-1], "it must be 16-bit [33, 48]"),
    ]
    if not symmetric:
        bad.append((slab.run(x, replace(packed, zero=None)), "has a relative error of"))
    for other, reason in bad:
        wrong = truth.judge(other, expected).wrong
        assert wrong is not None
        assert reason in wrong


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_truth_in_pieces_is_the_reference(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(bits)
    packed = truth.draw(generator, 100, 96, 32, False, BF16, bits)
    x, bias = truth.draw_input(generator, 5, 96, BF16), truth.draw_input(generator, 1, 100, BF16)[0]
    monkeypatch.setattr(truth, "PIECE", 1)
    assert [piece.out_features for _, piece in truth.pieces(packed)] == [32, 32, 32, 4]
    want = reference.run(x.double(), packed, bias.double(), torch.float64)
    torch.testing.assert_close(truth.truth(x, packed, bias).y, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(rivals.dense(packed, BF16), reference.dequantize(packed).to(BF16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_gemlite_gets_the_weight_in_its_format(symmetric: bool, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signatures of gemlite 0.6.0: (codes - zeros) * scales, codes uint8 [N, K], scales [N, G]."""

    class Layer:
        def __init__(self, W_nbits: int, group_size: int, in_features: int, out_features: int, **dtypes: str) -> None:
            assert (W_nbits, dtypes) == (bits, {"input_dtype": "fp16", "output_dtype": "fp16"})
            self.sizes = (out_features, in_features, group_size)

        def pack(self, W_q: Tensor, scales: Tensor, zeros: Tensor | int, bias: Tensor | None) -> None:
            assert (W_q.dtype, tuple(W_q.shape), bias) == (torch.uint8, self.sizes[:2], None)
            wide = scales.repeat_interleave(self.sizes[2], 1)
            points = zeros.repeat_interleave(self.sizes[2], 1) if isinstance(zeros, Tensor) else zeros
            self.weight = ((W_q.float() - points) * wide).half()

        def __call__(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight)

    core = types.ModuleType("gemlite.core")
    vars(core).update(GemLiteLinear=Layer, DType=types.SimpleNamespace(FP16="fp16", BF16="bf16"))
    monkeypatch.setitem(sys.modules, "gemlite", types.ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.core", core)
    generator = torch.Generator().manual_seed(0)
    packed = truth.draw(generator, 64, 128, 32, symmetric, F16, bits)
    x = truth.draw_input(generator, 3, 128, F16)
    rival = next(rival for rival in rivals.RIVALS if rival.name == "gemlite")
    assert truth.judge(rival.run(x, rival.prepare(packed, F16)), truth.truth(x, packed)).wrong is None


def test_cases_cover_the_grid_and_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = checking.cases(False)
    whole = [case for case in listed if {0, 1, 1024} <= set(case.rows)]
    for bits in (4, 8):
        grid = {(case.group, case.dtype, case.symmetric) for case in whole if case.bits == bits}
        assert len(grid) == len(checking.GROUPS) * 4
    assert {case.bits for case in listed} == {2, 3, 4, 8}
    assert any(case.n % 64 and case.k % 128 for case in listed)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    case = next(case for case in checking.cases(True) if case.group == 64 and not case.symmetric)
    good = checking.check_case(case, "cpu", 3)
    assert (good.wrong, good.products) == ((), len(case.rows) * len(good.kernels))
    with monkeypatch.context() as patched:
        patched.setattr(slab, "zero_points", lambda packed: None)
        bad = checking.check_case(case, "cpu", 3)
    assert any(failure.startswith("slab M=1 has a relative error of") for failure in bad.wrong)
    replace_slab(monkeypatch, lambda x, packed, bias: x.new_empty(len(x), packed.out_features))
    bad = checking.check_case(case, "cpu", 3)
    assert any("not finite" in failure for failure in bad.wrong), "fresh memory is NaN"
    calls = [0]

    def late(x: Tensor, packed: Any, bias: Any) -> Tensor:
        calls[0] += 1
        return slab.run(x, packed, bias) + (calls[0] % 10 == 0)

    replace_slab(monkeypatch, late)
    one_product = replace(case, rows=(9,))
    assert checking.check_case(one_product, "cpu", 3, repeats=9).wrong == ()
    calls[0] = 0
    assert checking.check_case(one_product, "cpu", 3, repeats=10).wrong == ("slab M=9 is not bit-equal when repeated",)


def test_shapes_are_parsed_or_refused() -> None:
    assert tables.parse_shapes(["4096x14336"]) == (Shape(4096, 14336),)
    for text in ("4096", "0x64", "64x", "a4x4"):
        with pytest.raises(LlmqError, match="a shape must be KxN, two positive numbers such as 4096x14336; got"):
            tables.parse_shapes([text])
    with pytest.raises(LlmqError, match="group_size must divide in_features 100; got 64; use 100 or a divisor"):
        truth.draw(torch.Generator(), 16, 100, 64, True, F16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (4, 0)}, "rows must be at least 1; got 0"),
        ({"group_size": -1}, "group must be a number of columns, or 0 for one per channel; got -1"),
        ({"tables": Path("nowhere")}, "the folder nowhere of launch tables does not exist"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmqError, match=message):
        replace(CONFIG, **change)


def test_the_output_folder_is_tested_before_anything_is_measured(tmp_path: Path) -> None:
    assert record.writable(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(LlmqError, match=r"--output .*file/x is not writable: Not a directory"):
        record.writable(tmp_path / "file" / "x")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_script_writes_one_record(tmp_path: Path) -> None:
    options = ["--self-test", "--dtype", "bfloat16", "--group", "0", "--asym", "--rows", "1,70", "--shapes", "128x64"]
    done = run(sys.executable, "scripts/bench_kernels.py", *options, "--output", tmp_path, "--seed", "4")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert file.name == "kernels-bfloat16-int4-gchannel-asym-cpu.json"
    assert (written["device"], written["seed"], written["self_test"], written["symmetric"]) == ("cpu", 4, True, False)
    assert written["versions"]["torch"] == torch.__version__
    assert written["command"].startswith("scripts/bench_kernels.py --self-test")
    assert str(tmp_path.parent) not in file.read_text(), "records are published: they hold no local paths"
    assert "SELF-TEST on the CPU: nothing below is a measurement" in done.stdout
    assert all(row["us"] > 0 and row["roofline"] > 0 for row in written["rows"])
    assert {"slab", "dense"} <= {row["what"] for row in written["rows"]}


def test_gpu_day_names_the_steps_that_failed(tmp_path: Path) -> None:
    done = run("scripts/gpu_day.sh", tmp_path, "--self-test", PYTHON="false")
    assert done.returncode == 1
    assert "FAILED: check (1) ceilings (1) sweep (1) bench (1) bench-bfloat16 (1)" in done.stdout
    assert (tmp_path / "logs" / "sweep.log").exists(), "a failing step does not stop the next one"
    assert run("scripts/gpu_day.sh").returncode == 2
    for wrong in ([""], [tmp_path, "--quick"], [tmp_path, "--self-test", "--quick"]):
        assert run("scripts/gpu_day.sh", *wrong).returncode == 2
    alone = run("scripts/gpu_day.sh", tmp_path / "b", PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert (alone.returncode, alone.stdout) == (2, ""), "without a GPU nothing starts"
    assert "finds no GPU; --self-test runs the steps on the CPU" in alone.stderr
