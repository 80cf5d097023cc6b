"""Zeros that the parts of a split K count themselves in with, on each device: for launches on streams and in CUDA graphs.

Every launch leaves its counters at zero. Launches on one stream follow each other, so each stream has one array. A launch
that is captured in a CUDA graph takes counters of its own from a slab that was cleared beforehand, so that graphs may be
replayed beside each other. Left out: giving counters back one graph at a time; `forget` gives back all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLAB_COUNTERS = 1 << 20  # 4 MB: a graph of an 8B model's decode step takes 21,504, if nothing was tuned
LEAST = 4096


class _Counters:
    """Of one device: an array for each stream, and a slab that captured launches share out."""

    def __init__(self) -> None:
        self.streams: dict[int, Tensor] = {}
        self.slab: Tensor | None = None
        self.taken = 0


_COUNTERS: dict[torch.device, _Counters] = {}


def reserve(device: torch.device) -> None:
    """The slab of a device, before any capture."""
    held = _COUNTERS.setdefault(device, _Counters())
    if held.slab is None and not torch.cuda.is_current_stream_capturing():
        held.slab = torch.zeros(SLAB_COUNTERS, dtype=torch.int32, device=device)


def zeros(device: torch.device, count: int) -> Tensor:
    """int32 zeros [count or more] that no launch has that could run at the same time."""
    held = _COUNTERS.setdefault(device, _Counters())
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _captured(held, device, count)
        stream = torch.cuda.current_stream(device).cuda_stream
    found = held.streams.get(stream)
    if found is None or found.numel() < count:
        found = held.streams[stream] = torch.zeros(max(count, LEAST), dtype=torch.int32, device=device)
    return found


def forget(device: torch.device) -> None:
    """Give back what graphs took. Only where none of the graphs captured so far on the device is replayed again."""
    held = _COUNTERS.get(device)
    if held is not None:
        held.taken = 0


def _captured(held: _Counters, device: torch.device, count: int) -> Tensor:
    """Counters that no other launch has. Cleared inside the graph where the slab is used up: right, but one more node."""
    size = -(-count // 4) * 4  # the next one begins at 16 bytes again
    if held.slab is None or held.taken + size > held.slab.numel():
        return torch.zeros(count, dtype=torch.int32, device=device)
    held.taken += size
    return held.slab[held.taken - size : held.taken]
