"""The time of a call on a device: weights out of cache, no host time, medians; and the measured limits of the device.

A kernel of a few microseconds cannot be timed alone. On CUDA its calls are captured in one graph, each call on another copy
of the weights (`copies_of`: so many that none is still in the second-level cache when its turn comes again). The graph is
replayed back to back with an event between replays, so that neither Python nor the launch of the graph is in the time.
Elsewhere the same calls run in a loop timed by the clock.

    graph      copy 0, copy 1, ... copy 7, copy 0, ...        at most MAX_CALLS calls, fewer if they are long
    replays    | graph | graph | graph | ...                  median over `samples` of (time / calls)

x is the same in every call, as in a model, where the previous layer has just written it.
Left out: hardware counters, fixed clocks.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.kernels import counters

MIN_COPIES = 8
CACHE_SIZES = 4  # a cache with random replacement keeps 2% of 4 times its size; 20% of twice its size
UNKNOWN_CACHE = 64 << 20  # bytes
MAX_CALLS = 128
GRAPH_US = 2000.0

Value = TypeVar("Value")


@dataclass(frozen=True)
class Effort:
    """How much work a measurement may take."""

    samples: int = 15
    """Replays; the result is their median."""
    copy_bytes: int = 1 << 30
    """Size of the copy that measures the memory bandwidth."""
    matmul: int = 8192
    """Size of the square matmul that measures the arithmetic rate."""


QUICK = Effort(5)
SELF_TEST = Effort(1, 1 << 22, 256)


@dataclass(frozen=True)
class Timing:
    """The time of a call."""

    us: float
    """Median microseconds."""
    spread: float
    """(largest - smallest) / median over the samples."""
    calls: int
    """Calls in one sample."""
    samples: int
    """Samples that the median is of."""
    output: Tensor
    """The result of the last call."""


class Budget:
    """A time box that starts when it is made. Raises `LlmqError` for less than 0 seconds."""

    def __init__(self, seconds: float) -> None:
        if seconds < 0:
            raise LlmqError(f"seconds must be at least 0; got {seconds:g}")
        self.seconds = seconds
        self.started = time.monotonic()

    def spent(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.started

    def over(self) -> bool:
        """Whether no time is left."""
        return self.spent() >= self.seconds


def copies_of(value: Value, nbytes: int, device: torch.device) -> list[Value]:
    """The value and clones of it: at least 8, and together at least 4 times the device's last cache. nbytes: of one."""
    count = max(MIN_COPIES, -(-CACHE_SIZES * cache_bytes(device) // max(1, nbytes)))
    return [value, *(copy.deepcopy(value) for _ in range(count - 1))]


def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's second-level cache; 0 on CPUs, where it is not used."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", UNKNOWN_CACHE))


def time_calls(calls: Sequence[Callable[[], Tensor]], device: torch.device, effort: Effort) -> Timing:
    """The time of one call. calls: the same work on each copy of the weights; on CUDA all of them must be capturable."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _replayed(calls, device, effort)
    output = calls[0]()
    times = []
    for _ in range(effort.samples):
        started = time.perf_counter()
        for call in calls:
            output = call()
        times.append((time.perf_counter() - started) * 1e6 / len(calls))
    return _timing(times, len(calls), output)


def _replayed(calls: Sequence[Callable[[], Tensor]], device: torch.device, effort: Effort) -> Timing:
    counters.forget(device)  # the graph of the last measurement no longer exists
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:  # compile, and allocate workspaces that a capture may not allocate
            call()
    rounds = _rounds(calls, stream)
    graph, output = _captured(calls, rounds, stream)
    marks = _marks(effort.samples + 1)
    with torch.cuda.stream(stream):
        graph.replay()
        graph.replay()
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
    stream.synchronize()
    count = rounds * len(calls)
    times = [a.elapsed_time(b) * 1000 / count for a, b in itertools.pairwise(marks)]
    return _timing(times, count, output.clone())


@cache  # cuBLAS keeps a workspace, and split K counters, per stream
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured(
    calls: Sequence[Callable[[], Tensor]], rounds: int, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of all calls, `rounds` times, and the output of the last one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                output = call()
    return graph, output


def _rounds(calls: Sequence[Callable[[], Tensor]], stream: torch.cuda.Stream) -> int:
    """How often a graph goes through all copies. Estimated with a graph too: outside one, short calls take host time."""
    graph, _ = _captured(calls, 1, stream)
    marks = _marks(2)
    with torch.cuda.stream(stream):
        graph.replay()
        marks[0].record()
        graph.replay()
        marks[1].record()
    stream.synchronize()
    rounds = int(GRAPH_US / max(1.0, marks[0].elapsed_time(marks[1]) * 1000)) + 1
    return max(1, min(rounds, MAX_CALLS // len(calls)))


def _marks(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


def _timing(times: list[float], calls: int, output: Tensor) -> Timing:
    median = statistics.median(times)
    return Timing(median, (max(times) - min(times)) / median if median else 0.0, calls, len(times), output)


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of a device."""

    copy: float
    """Bytes per second of a copy, read and written."""
    flops: float
    """Operations per second of a dense matmul."""

    def floor_us(self, nbytes: float, flops: float) -> tuple[float, str]:
        """The least microseconds that move `nbytes` and compute `flops`, and which decides: "bytes" or "flops"."""
        times = ((nbytes / self.copy * 1e6, "bytes"), (flops / self.flops * 1e6, "flops"))
        return max(times)


def ceilings(device: torch.device, dtype: torch.dtype, effort: Effort) -> Ceilings:
    """Measured copy bandwidth (bytes read plus bytes written) and the rate of a square matmul of random numbers in `dtype`."""
    source = torch.randn(effort.copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    moved = time_calls([lambda: target.copy_(source)], device, effort)
    size = effort.matmul
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = time_calls([lambda: torch.mm(a, b)], device, effort)
    return Ceilings(2 * source.nbytes / moved.us * 1e6, 2 * size**3 / product.us * 1e6)
