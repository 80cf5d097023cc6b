"""The sweep in Triton's interpreter: wrong results are discarded, the table is read back. Run by `test_wna16.py`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.bench.kernels import benchmark, contenders, timing, tuning
from llmq.bench.kernels.timing import Budget, Effort
from llmq.errors import LlmqError
from llmq.kernels import wna16
from llmq.kernels.launch import Device, Launch, configure, nearest, table_of

CPU = torch.device("cpu")
TASK = tuning.TuningTask("float16", 128, 8, 128, 256)
GOOD = Launch(8, 64, 4, 3, 1, "portable")
LAUNCHES = [GOOD, replace(GOOD, split=2), replace(GOOD, bn=256)]
EFFORT = Effort(1)


def swept(budget: float = 60.0, **more: Any) -> tuning.Sweep:
    results = tuning.Sweep()
    tuning.sweep([TASK], CPU, Budget(budget), 1, EFFORT, results, lambda device, task: LAUNCHES, **more)
    return results


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_COPIES", 2)


def test_the_fastest_right_launch_becomes_a_row(tmp_path: Path) -> None:
    done: list[int] = []
    results = swept(done=lambda: done.append(1))
    assert results.discarded == {"LlmqError: bn must divide the padded out_features N; got N; use N": 1}
    assert (len(results.rows), results.skipped, results.wrong(), done) == (1, [], [], [1])
    for _ in range(2):
        tuning.crossover([TASK, replace(TASK, size=16)], CPU, Budget(60), 1, EFFORT, results, (1, 9))
    (crossing,) = results.crossover
    assert [time["m"] for time in crossing["times"]] == [1, 9]
    assert crossing["triton_wins_up_to"] == 0, "the interpreter is slower than slab"
    known = wna16.device_of(CPU)
    tuning.save(tmp_path / "cpu.json", known, {"device": "cpu", "measured": "a test"}, results)
    table = table_of(known, tmp_path)
    launch = configure(known, "float16", 128, 1, 128, 256, table)
    row = nearest(table, "float16", 128, 8, 128, 256)
    assert row is not None
    assert (row.bn, row.split) == (launch.bn, launch.split) == (64, results.rows[0]["split"])
    again = tuning.load(tmp_path / "cpu.json", known)
    tuning.sweep([TASK], CPU, Budget(0), 1, EFFORT, again)
    assert again.rows == results.rows
    assert again.skipped == [], "a row that the table has is not measured again"
    config = contenders.KernelBenchConfig(
        device=CPU,
        dtype=torch.float16,
        group_size=128,
        symmetric=True,
        shapes=(contenders.Shape(256, 128),),
        rows=(1,),
        effort=EFFORT,
        tables=tmp_path,
    )
    measured = benchmark.BenchResults()
    benchmark.bench(config, timing.Ceilings(1e9, 1e9), measured, lambda line: None)
    (described,) = [row["launch"] for row in measured.rows if row["what"] == "triton"]
    assert described == f"{launch} (measured)"
    assert json.dumps(measured.rows)


def test_a_launch_with_a_wrong_result_never_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right, count = wna16.multiply, Counter[int]()

    def wrong(x: Tensor, tiled: Any, bias: Any = None, launch: Launch | None = None) -> Tensor:
        assert launch is not None
        count[launch.split] += 1
        return right(x, tiled, bias, launch) * (0.5 if launch.split == 2 else 1)

    monkeypatch.setattr(wna16, "multiply", wrong)
    results = swept()
    assert results.rows[0]["split"] == 1
    assert results.discarded["wrong result"] == 1
    assert results.wrong() == ["wrong result"]
    assert count[2] == 1, "not timed"
    monkeypatch.setattr(wna16, "multiply", lambda x, *rest: right(x, *rest) + torch.rand(1).half())
    assert swept().rows == []


def test_a_task_without_time_is_skipped() -> None:
    results = swept(0.0)
    assert (results.rows, results.skipped) == ([], [str(TASK)])


def test_configurations_are_compiled_ahead_and_failures_are_ignored() -> None:
    (item, *_) = tuning.ahead([TASK], CPU, 1)
    assert item[:2] == ("cpu", ("float16", 4, 128))
    assert set(item[2]) == set(tuning.candidates(Device("interpreter", 8), TASK))
    assert tuning.compile_ahead((*item[:2], tuple(LAUNCHES))) == 2
    with pytest.raises(LlmqError, match="bn must divide"):
        wna16.multiply(torch.zeros(1, 256).half(), wna16.prepare(tuning._inputs(TASK, CPU, 1, 1)[0]), None, LAUNCHES[2])
