"""What is kept of a linear's inputs: their second moment H = mean over tokens of x x^T, and the number of tokens.

Sums are accumulated in float32, whatever dtype the model runs in, and in a fixed order: window i belongs to lane i mod 8,
the windows of a lane are summed in order, and then the lanes are added in order. So 1, 2, 4 or 8 processes that share the
lanes get the same bits. Batches hold windows of one lane (`split_into_lanes`) and are observed lane by lane, so
that one lane's sum and the total are all that is ever in memory.

H is symmetric: only panels on and right of the diagonal are computed (0.56 of the work at eight panels) and mirrored once.
Left out: float64 sums. Each window holds a thousand tokens or more, which the matrix product sums before they are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import LlmqError

LANES = 8
PANEL = 192
HELD_OUT = 4
"""One window of this many is held out."""


@dataclass(frozen=True)
class Statistics:
    """What is known of the inputs of a group of linears.

    Fields:
        hessian: float32 [K, K], the second moment that weights are rounded against.
        tokens: how many tokens it is the mean of.
        held_out: float32 [K, K], the second moment of other tokens, or of some of the same; None where none is kept.
        held_out_tokens: how many tokens that is the mean of.
        mean_abs: float32 [K], the mean of |x|; None where it is not needed.
    """

    hessian: Tensor
    tokens: int
    held_out: Tensor | None = None
    held_out_tokens: int = 0
    mean_abs: Tensor | None = None


def split_into_lanes(windows: Tensor, tokens_per_batch: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Token windows int64 [n, tokens] as batches [b, tokens] of windows of one lane, and the lane of each batch.

    Batches come in the order of their lanes. Their size depends on `tokens_per_batch` alone.
    """
    size = max(1, tokens_per_batch // windows.shape[1])
    batches: list[Tensor] = []
    lanes: list[int] = []
    for lane in range(min(LANES, len(windows))):
        parts = torch.split(windows[lane::LANES], size)
        batches += parts
        lanes += [lane] * len(parts)
    return tuple(batches), tuple(lanes)


class LaneSum:
    """A float32 sum of tensors of one shape, lane by lane. Lanes must come in ascending order."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._total: Tensor | None = None
        self._part: Tensor | None = None
        self._lane = -1

    def of(self, lane: int) -> Tensor:
        """The tensor to accumulate terms of `lane` into, in place."""
        if self._part is None or lane != self._lane:
            assert lane > self._lane, "lanes must come in ascending order"
            self._close()
            self._part = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
            self._lane = lane
        return self._part

    def value(self) -> Tensor:
        """The sum over all lanes; nothing can be added after. The memory of the parts is reused."""
        self._close()
        if self._total is None:
            return torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        return self._total

    def _close(self) -> None:
        if self._part is not None:
            self._total = self._part if self._total is None else self._total.add_(self._part)
            self._part = None


class SecondMoment:
    """The running second moment of inputs with K features."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._sum = LaneSum((features, features), device)
        self.tokens = 0

    def add(self, inputs: Tensor, lane: int = 0) -> None:
        """Count in `inputs` [..., K], any floating dtype, of one lane."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()  # [tokens, K]
        total = self._sum.of(lane)
        for start in range(0, x.shape[1], PANEL):
            panel = x[:, start : start + PANEL]
            total[start : start + PANEL, start:].addmm_(panel.T, x[:, start:])
        self.tokens += x.shape[0]

    def empty(self) -> Tensor:
        """The moment of no token: zeros, float32 [K, K]."""
        return LaneSum(self._sum.shape, self._sum.device).value()

    def value(self, name: str) -> Tensor:
        """H float32 [K, K], symmetric; nothing can be added after.

        Raises `LlmqError`, naming the input of `name`, where no token was seen or H is not finite.
        """
        if self.tokens == 0:
            raise LlmqError(f"no token reached {name}: nothing is known of its inputs")
        total = self._sum.value()
        for start in range(0, len(total), PANEL):
            stop = start + PANEL
            right = total[start:stop, start:].div_(self.tokens)
            if not bool(torch.isfinite(right).all()):
                raise LlmqError(
                    f"the input of {name} holds NaN or inf: the model overflows in its dtype on this calibration text; "
                    "try --dtype bfloat16 or float32"
                )
            square = right[:, :PANEL].triu()
            right[:, :PANEL] = square + square.triu(1).T
            total[stop:, start:stop] = right[:, PANEL:].T
        return total


def held_out_start(hidden: Sequence[Tensor]) -> int:
    """The number of the first calibration token that is held out, counted over batches [..., batch, tokens, width] in order.

    The last quarter of the windows is held out, at least one; of a single window its last quarter.
    """
    windows, tokens = sum(x.shape[-3] for x in hidden), hidden[0].shape[-2]
    if windows == 1:
        return tokens - tokens // HELD_OUT
    return (windows - max(1, windows // HELD_OUT)) * tokens


def observe(
    inputs: Iterable[tuple[int, Tensor]], name: str, held_out_from: int | None = None, apart: bool = False
) -> Statistics:
    """The statistics of `inputs`: (lane, x [..., K]) of every batch, in the order of the lanes.

    name: of a linear, for errors. held_out_from: tokens from this one on are gathered once more by themselves; None for
    none. apart: leave those out of `hessian`, and also gather the mean of |x|.
    Raises `LlmqError` as `SecondMoment.value`.
    """
    fitted: SecondMoment | None = None
    passed = 0  # tokens so far
    for lane, given in inputs:
        x = given.reshape(-1, given.shape[-1]).float()  # [tokens, K]
        if fitted is None:
            fitted, held_out = SecondMoment(x.shape[1], x.device), SecondMoment(x.shape[1], x.device)
            absolute = LaneSum((x.shape[1],), x.device)
        cut = len(x) if held_out_from is None else min(max(0, held_out_from - passed), len(x))
        passed += len(x)
        used = x[:cut] if apart else x
        if len(used):
            fitted.add(used, lane)
        if len(used) and apart:
            absolute.of(lane).add_(torch.linalg.vector_norm(used, 1, 0))
        if cut < len(x):
            held_out.add(x[cut:], lane)
    if fitted is None:
        raise LlmqError(f"no token reached {name}: nothing is known of its inputs")
    return Statistics(
        hessian=fitted.value(name),
        tokens=fitted.tokens,
        held_out=held_out.value(name) if held_out.tokens else None,
        held_out_tokens=held_out.tokens,
        mean_abs=absolute.value() / fitted.tokens if apart else None,
    )
