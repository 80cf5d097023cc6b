"""What a transform is: it changes the weights of a block, not its function, so that rounding them costs less.

    transform(block, pair, observed, task) -> Proposal

Proposals for all groups of linears are made first, each while only its own statistics are alive, then applied. A
transform never rounds by itself: it is given the rounding that will follow and the inputs that the linears see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmq.blocks.statistics import Observed
from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight
from llmq.transforms.pairs import Pair

Round = Callable[[Tensor, Tensor, Grid], QuantizedWeight]
"""weight float32 [N, K], second moment float32 [K, K], grid -> the weight as the method rounds it."""


@dataclass(frozen=True)
class Task:
    """grids: of every linear to be quantized. round: the rounding that will follow. dtype: in which scales are stored."""

    grids: Mapping[str, Grid]
    round: Round
    dtype: torch.dtype


@dataclass(frozen=True)
class PairReport:
    """What was done about one group of linears.

    producer: None where nothing feeds them that could be rescaled. scales: in words, as found. fit, held: output error of
    the linears after over before: on the windows chosen by, and with the real rounding on held-out ones; None where it
    was not measured.
    note: why nothing was folded; None where it was.
    """

    producer: str | None
    consumers: tuple[str, ...]
    scales: str | None
    fit: float | None
    held: float | None
    note: str | None

    def inside(self, block: str) -> PairReport:
        """The same with names that begin with the block's."""
        producer = None if self.producer is None else f"{block}.{self.producer}"
        return replace(self, producer=producer, consumers=tuple(f"{block}.{name}" for name in self.consumers))


@dataclass(frozen=True)
class Proposal:
    """What a transform would do about one pair. apply: does it and returns None, or why it was left after all; None where
    nothing is to be done, for the reason in the report."""

    report: PairReport
    apply: Callable[[], str | None] | None = None

    def settled(self) -> PairReport:
        """Apply it; the report of what became of it."""
        return self.report if self.apply is None else replace(self.report, note=self.apply())


Transform = Callable[[nn.Module, Pair, Observed, Task], Proposal]
