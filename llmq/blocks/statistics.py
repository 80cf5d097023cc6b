"""What is kept of a linear's inputs: the second moment H = mean over tokens of x x^T, and the token count.

Accumulated in float32 whatever dtype the model runs in, in the fixed order in which inputs are given, so that the same
windows give the same bits. H is symmetric: only panels on and right of the diagonal are computed (0.6 of the work at
four panels) and mirrored once at the end.
Left out: float64 sums. Windows hold a thousand tokens or more, each summed by the matrix product before it is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import LlmqError

PANEL = 384


@dataclass(frozen=True)
class Observed:
    """What a few calibration windows say of the input of one group of linears.

    mean: float32 [K], mean |x| of each channel. fit, held: second moments float32 [K, K], of the windows to choose by and
    of others to judge by.
    """

    mean: Tensor
    fit: Tensor
    held: Tensor


class Watcher:
    """Gathers an `Observed`: the last quarter of each batch is held out."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._fit, self._held = SecondMoment(features, device), SecondMoment(features, device)
        self._sum = torch.zeros(features, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Count in `inputs` [..., K]."""
        x = inputs.reshape(-1, inputs.shape[-1])
        cut = len(x) * 3 // 4
        self._fit.add(x[:cut])
        self._held.add(x[cut:])
        self._sum += x[:cut].float().abs().sum(0)

    def value(self, name: str) -> Observed:
        """What was seen; `name` stands in errors. Nothing can be added after."""
        return Observed(self._sum / self._fit.tokens, self._fit.value(name), self._held.value(name))


class SecondMoment:
    """The running second moment of inputs with K features. State: the sum so far and the tokens in it."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count in `inputs` [..., K], any floating dtype."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()  # [tokens, K]
        for start in range(0, x.shape[1], PANEL):
            panel = x[:, start : start + PANEL]
            self._sum[start : start + PANEL, start:].addmm_(panel.T, x[:, start:])
        self.tokens += x.shape[0]

    def value(self, name: str) -> Tensor:
        """H float32 [K, K], symmetric, in place of the sum: nothing can be added after.

        Raises `LlmqError`, naming the input of `name`, where it is not finite.
        """
        if self.tokens == 0:
            raise LlmqError(f"no token reached {name}: nothing is known of its inputs")
        for start in range(0, len(self._sum), PANEL):
            stop = start + PANEL
            right = self._sum[start:stop, start:].div_(self.tokens)
            if not bool(torch.isfinite(right).all()):
                raise LlmqError(
                    f"the input of {name} holds NaN or inf: the model overflows in its dtype on this calibration text; "
                    "try --dtype bfloat16 or float32"
                )
            square = right[:, :PANEL].triu()
            right[:, :PANEL] = square + square.triu(1).T
            self._sum[stop:, start:stop] = right[:, PANEL:].T
        return self._sum
