"""What a transform is: it changes the weights of a block, not its function, so that rounding them costs less.

    transform(block, pair, statistics, context) -> Proposal

Proposals for all groups of linears are made first, each while only its own statistics are in memory, then applied. A
transform never rounds by a rule of its own: it is given the rounding that will follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from llmq.blocks.statistics import Statistics
from llmq.methods.base import Rounding, Target
from llmq.transforms.pairs import Pair


@dataclass(frozen=True)
class TransformContext:
    """What a transform may know of what follows.

    Fields:
        rounding: the method that the weights are rounded with afterwards.
        targets: what every linear to be quantized is rounded to, by its name in the block.
    """

    rounding: Rounding
    targets: Mapping[str, Target]


@dataclass(frozen=True)
class PairReport:
    """What was done about one group of linears.

    Fields:
        producer: None where nothing feeds them that could be rescaled.
        consumers: the linears.
        scales: the exponents found, as text; None where none were searched.
        fitted_ratio: output error of the linears with the scales over that without, on the windows that the scales were
            chosen by; None where it was not measured.
        held_out_ratio: the same on held-out windows, with the rounding that follows.
        note: why no scales were folded in; None where they were.
    """

    producer: str | None
    consumers: tuple[str, ...]
    scales: str | None
    fitted_ratio: float | None
    held_out_ratio: float | None
    note: str | None

    def inside(self, block: str) -> PairReport:
        """The same with names that begin with the block's."""
        producer = None if self.producer is None else f"{block}.{self.producer}"
        return replace(self, producer=producer, consumers=tuple(f"{block}.{name}" for name in self.consumers))


@dataclass(frozen=True)
class Proposal:
    """What a transform would do about one pair.

    Fields:
        report: what it found.
        apply: does it and returns None, or why it could not be done; None where nothing is to be done, for the reason in
            the report.
    """

    report: PairReport
    apply: Callable[[], str | None] | None = None

    def applied(self) -> PairReport:
        """Apply it, and report what became of it."""
        return self.report if self.apply is None else replace(self.report, note=self.apply())


Transform = Callable[[nn.Module, Pair, Statistics, TransformContext], Proposal]
