"""Timing on a fake GPU: which calls a graph has, what a time is divided by, who gets counters.

Only the order of calls and the arithmetic are tested here. Streams, graphs and events of a real GPU are in `test_gpu.py`.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.bench.kernels import timing, tuning
from llmq.bench.kernels.timing import Budget, Ceilings, Effort
from llmq.errors import LlmqError
from llmq.kernels import counters
from llmq.kernels.launch import Device, buckets, configure, rows_of, table_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class FakeGpu:
    """A clock in microseconds that only calls and replays advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call_us: float) -> None:
        self.now, self.call_us = 0.0, call_us
        self.captured: list[int] = []
        self.capturing = False
        self.made = Counter[int]()
        self.replays = 0
        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        timing._stream.cache_clear()
        for name, value in {
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "graph": self.graph,
            "Event": self.event,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def graph(self, graph: Any, stream: Any) -> Any:
        self.capturing, self.captured = True, []
        return nullcontext()

    def replay(self) -> None:
        self.capturing = False
        self.replays += 1
        # The later replays are slower, so that the median depends on all of them.
        self.now += len(self.captured) * self.call_us * (1 if self.replays < 8 else 2)

    def event(self, enable_timing: bool) -> Any:
        mark = SimpleNamespace(at=0.0)
        mark.record = lambda: setattr(mark, "at", self.now)
        mark.elapsed_time = lambda other: (other.at - mark.at) / 1000
        return mark

    def calls(self, count: int) -> list[Callable[[], Tensor]]:
        def call(index: int) -> Tensor:
            if self.capturing:
                self.captured.append(index)
            else:
                self.now += self.call_us
                self.made[index] += 1
            return torch.tensor([index])

        return [lambda index=index: call(index) for index in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize(("call_us", "expected"), [(5.0, 128), (50.0, 48), (900.0, 8)])
def test_a_graph_goes_through_all_copies_in_turn(
    call_us: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, call_us)
    forgotten: list[torch.device] = []
    monkeypatch.setattr(counters, "forget", forgotten.append)
    result = timing.time_calls(gpu.calls(8), CUDA, Effort(samples=7))
    assert result.calls == expected
    assert gpu.captured == [*range(8)] * (expected // 8)
    assert gpu.made == dict.fromkeys(range(8), 1), "a warm-up before the capture"
    assert gpu.replays == 2 + 2 + 7, "estimate and measurement, each after a warm-up"
    assert forgotten == [CUDA]
    # 3 of the last 7 replays take one call's time per call, 4 take twice as much.
    assert result.us == pytest.approx(2 * call_us)
    assert result.spread == pytest.approx(0.5)
    assert result.output.tolist() == [7]


def test_all_copies_are_called_even_above_the_maximum_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, 1.0)
    assert timing.time_calls(gpu.calls(200), CUDA, Effort(samples=2)).calls == 200
    assert gpu.captured == list(range(200))


def test_on_the_cpu_every_copy_runs_in_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 8e-6, 1.0, 1.0 + 24e-6, 2.0, 2.0 + 16e-6])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    made = Counter[int]()
    calls = [lambda index=index: made.update([index]) or torch.tensor([index]) for index in range(8)]
    result = timing.time_calls(calls, CPU, Effort(samples=3))
    assert made == {0: 4} | dict.fromkeys(range(1, 8), 3)
    assert result.us == pytest.approx(2.0)
    assert result.spread == pytest.approx(1.0)
    assert result.output.tolist() == [7]


def test_copies_are_eight_or_more_and_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    value = (torch.arange(4), 7)
    copies = timing.copies_of(value, 32, CPU)
    assert len(copies) == 8
    assert len({copy[0].data_ptr() for copy in copies}) == 8
    assert all(torch.equal(copy[0], value[0]) for copy in copies)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    assert len(timing.copies_of(value, 32, CPU)) == 125
    assert len(timing.copies_of(value, 10_000, CPU)) == 8
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    assert timing.cache_bytes(CUDA) == 50 << 20


def test_the_roofline_is_the_larger_of_two_floors() -> None:
    limits = Ceilings(copy=2e12, flops=1e15)
    assert limits.floor_us(4e6, 1e9) == (pytest.approx(2.0), "bytes")
    assert limits.floor_us(4e6, 4e9) == (pytest.approx(4.0), "flops")
    reached = timing.ceilings(CPU, torch.float32, timing.SELF_TEST)
    assert reached.copy > 1e6
    assert reached.flops > 1e6


def test_counters_of_graphs_can_be_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise later launches would zero their own counters inside the graph, and a benchmark would time that."""
    monkeypatch.setattr(counters, "_COUNTERS", {})
    monkeypatch.setattr(counters, "SLAB_COUNTERS", 16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    counters.reserve(CPU)
    state = counters._COUNTERS[CPU]
    slab = state.slab
    assert slab is not None
    first, second = (counters._captured(state, CPU, 6) for _ in range(2))
    assert (second.data_ptr() - first.data_ptr()) == 8 * 4
    assert counters._captured(state, CPU, 6).data_ptr() != slab.data_ptr()
    counters.forget(CPU)
    assert counters._captured(state, CPU, 6).data_ptr() == slab.data_ptr()
    counters.forget(torch.device("meta"))


def test_threads_take_distinct_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_COUNTERS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    threads, takes, size = 8, 200, 4
    barrier = threading.Barrier(threads)
    starts: list[int] = []

    def take(_: int) -> None:
        barrier.wait()
        counters.reserve(CPU)
        state = counters._COUNTERS[CPU]
        starts.extend([counters._captured(state, CPU, size).storage_offset() for _ in range(takes)])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(take, range(threads)))
    finally:
        sys.setswitchinterval(before)
    assert sorted(starts) == list(range(0, threads * takes * size, size))


def test_a_budget_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    budget = Budget(5.0)
    now[0] = 14.9
    assert not budget.over()
    now[0] = 15.0
    assert budget.over()
    assert budget.spent() == 5.0


@pytest.mark.parametrize("device", [Device("sm_90", 132), Device("sm_80", 108), Device("gfx942", 304)])
def test_candidates_fit_and_start_with_the_rule(device: Device) -> None:
    listed = tuning.tasks(device.arch, ["float16", "bfloat16"], [128, 0], [*tuning.SIZES, (1000, 4160)], [4, 8])
    assert len(set(listed)) == len(listed)
    assert {task.size for task in listed} == set(buckets(device.arch))
    assert (1000, 128) not in {(task.k, task.group) for task in listed}, "128 does not divide 1000"
    few = buckets(device.arch)[0]
    first = listed[: len(tuning.SIZES)]
    assert {(task.weights, task.size) for task in first} == {(("float16", 4, 128), few)}
    assert {task.bits for task in listed} == {4, 8}
    for task in listed:
        launches = tuning.candidates(device, task)
        assert configure(device, task.dtype, task.group, task.rows, task.n, task.k, bits=task.bits) == launches[0]
        assert len(set(launches)) == len(launches) > 3
        for launch in launches:
            assert launch.bm == task.size
            assert -(-task.n // 64) % (launch.bn // 64) == 0
            assert launch.split <= -(-task.k // 128)


def test_groups_that_divide_no_shape_are_refused() -> None:
    for group in (5, -1):
        with pytest.raises(LlmqError, match=rf"groups must divide K, or be 0 \(per channel\); got {group} for 128x64"):
            tuning.tasks("sm_90", ["float16"], [group], [(128, 64)])
    with pytest.raises(LlmqError, match="seconds must be at least 0; got -5"):
        Budget(-5)


def test_a_saved_table_decides_the_launch(tmp_path: Path) -> None:
    device = Device("sm_90", 132)
    row = {
        "dtype": "float16",
        "bits": 4,
        "group": 128,
        "bucket": 8,
        "n": 4096,
        "k": 4096,
        "bn": 64,
        "warps": 8,
        "stages": 5,
    }
    sweep = tuning.Sweep([row | {"split": 2, "us": 1.0, "m": 1, "error": 0.0, "tried": 3}])
    sweep.discarded["OutOfResources: N"] += 2
    path = tmp_path / "tuned" / "some-gpu.json"
    tuning.save(path, device, {"device": "some GPU", "measured": "never"}, sweep)
    assert [file.name for file in path.parent.iterdir()] == ["some-gpu.json"]
    table = table_of(device, path.parent)
    assert table == rows_of(sweep.rows)
    launch = configure(device, "float16", 128, 1, 4096, 4096, table)
    assert (launch.bn, launch.warps, launch.stages, launch.split) == (64, 8, 5, 2)
    eight = configure(device, "float16", 128, 1, 4096, 4096, table, bits=8)
    assert eight == configure(device, "float16", 128, 1, 4096, 4096, bits=8), "a row of another width is not used"
    assert eight.stages == 3
    assert tuning.load(path, device).rows == sweep.rows, "a later sweep continues here"
    assert tuning.load(path, device).discarded == sweep.discarded
    assert tuning.load(path, Device("sm_80", 108)).rows == []
    assert tuning.load(tmp_path / "none.json", device).rows == []
