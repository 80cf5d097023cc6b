"""Arrival counters for the split-K reduction, on each device: for launches on streams and in CUDA graphs.

Every launch leaves its counters at zero. Launches on one stream run one after the other, so each stream has one array. A
launch that is captured in a CUDA graph takes its own counters from a slab that was zeroed beforehand, so that graphs can be
replayed at the same time. Several threads may take counters. Counters are never freed automatically: after destroying the
last graph of a device, call `forget`. Left out: freeing the counters of a single graph.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SLAB_COUNTERS = 1 << 20  # 4 MB; a graph of an 8B model's decode step takes 21,504 with untuned launches
MIN_COUNTERS = 4096


class _Counters:
    """The counters of one device: an array for each stream, and a slab that captured launches divide among themselves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.streams: dict[int, Tensor] = {}
        self.slab: Tensor | None = None
        self.taken = 0


_COUNTERS: dict[torch.device, _Counters] = {}


def reserve(device: torch.device) -> None:
    """Allocate the slab of a device. Must be called before any capture."""
    state = _COUNTERS.setdefault(device, _Counters())
    with state.lock:
        if state.slab is None and not torch.cuda.is_current_stream_capturing():
            state.slab = torch.zeros(SLAB_COUNTERS, dtype=torch.int32, device=device)


def zeros(device: torch.device, count: int) -> Tensor:
    """int32 zeros [at least count] that no launch uses that could run at the same time."""
    state = _COUNTERS.setdefault(device, _Counters())
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _captured(state, device, count)
        stream = torch.cuda.current_stream(device).cuda_stream
    array = state.streams.get(stream)
    if array is None or array.numel() < count:
        array = state.streams[stream] = torch.zeros(max(count, MIN_COUNTERS), dtype=torch.int32, device=device)
    return array


def forget(device: torch.device) -> None:
    """Make the counters of all captured graphs available again. Only valid if no graph captured so far on the device is replayed
    again.
    """
    state = _COUNTERS.get(device)
    if state is not None:
        with state.lock:
            state.taken = 0


def _captured(state: _Counters, device: torch.device, count: int) -> Tensor:
    """Counters that no other launch uses. Without room in the slab they are zeroed inside the graph: correct, one more node."""
    size = -(-count // 4) * 4  # keeps every slice aligned to 16 bytes
    with state.lock:
        start = state.taken
        if state.slab is not None and start + size <= state.slab.numel():
            state.taken = start + size
            return state.slab[start : start + size]
    return torch.zeros(count, dtype=torch.int32, device=device)
