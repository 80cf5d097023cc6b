"""How much better a layer is rounded for its calibration tokens than for others: measured where tokens are few.

GPTQ knows the second moment of a layer's K inputs from some tokens, and spreads errors over what those tokens do not see;
the fewer tokens there are for K, the more of its gain is lost on any other text. Where there are fewer than `ENOUGH` tokens
per input, the moment of the last quarter of the windows is gathered once more by itself, `ROWS` rows of the weight are
rounded again, against the other windows only, and

    gap = output error on the held-out windows / output error on those that were fitted

The weights that are written come from all tokens, and are the same to the bit whether a gap is measured or not. The gap
says a little too much, since it is that of the fitted windows alone. Where there are enough, nothing is done.

SmolLM2-135M in general position, GPTQ int4 g64, WikiText-2 in windows of 512; the mean of 30 blocks:

    windows                             4       8      16
    q, k, v (576 inputs): per input   3.6     7.1      14       gap  3.0    1.9    1.28
    down_proj (1536 inputs)           1.3     2.7     5.3       gap  9.7    4.2    1.90

It falls as inputs over tokens, and reaches `TOLD` at about `ENOUGH`; measuring costs 15% of such a short run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llmq.blocks.statistics import SecondMoment
from llmq.core.quantized import QuantizedWeight
from llmq.methods.base import output_errors

ENOUGH = 16  # tokens per input
TOLD = 1.25  # gaps from here on are told
ROWS = 128

Round = Callable[[Tensor, Tensor], QuantizedWeight]
"""weight float32 [N, K], second moment float32 [K, K] -> the weight as the method rounds it."""


class Holdout:
    """The second moment of the held-out tokens of one input; none is gathered where there are enough tokens.

    features: K. tokens: in all calibration windows. window: tokens in one; a single window is cut at three quarters.
    """

    def __init__(self, features: int, tokens: int, window: int, device: torch.device) -> None:
        windows = tokens // window
        held = max(1, windows // 4) * window if windows > 1 else tokens // 4
        self._fitted = tokens - held  # tokens to come before those that are held out
        self._moment = SecondMoment(features, device) if few(tokens, features) and held else None
        self._moments: tuple[Tensor, Tensor] | None = None  # of the fitted tokens, and of those held out

    def add(self, inputs: Tensor) -> None:
        """Count in `inputs` [..., K], in the order of the windows."""
        if self._moment is None:
            return
        x = inputs.reshape(-1, inputs.shape[-1])
        if len(x) > self._fitted:
            self._moment.add(x[self._fitted :])
        self._fitted = max(0, self._fitted - len(x))

    def gap(self, name: str, weight: Tensor, hessian: Tensor, tokens: int, round_: Round) -> float | None:
        """The gap of `weight` float32 [N, K] on inputs whose second moment over all `tokens` is `hessian` [K, K].

        The first call overwrites `hessian` with the moment of the fitted tokens: a third K x K matrix would decide the peak
        of a run; later calls (other weights that read the same input) go on from there. name: stands in errors. None
        where there are enough tokens, or all or none of them were held out.
        """
        if self._moment is None or not 0 < self._moment.tokens < tokens:
            return None
        count = self._moment.tokens
        if self._moments is None:
            held = self._moment.value(name)
            fit = hessian.mul_(tokens).sub_(held, alpha=count).div_(tokens - count)
            fit.diagonal().clamp_min_(
                0
            )  # an input that only held-out tokens have leaves rounding errors of either sign
            self._moments = fit, held
        fit, held = self._moments
        some = some_rows(weight)
        rounded = round_(some, fit)
        fitted, held_out = (output_errors(some, (rounded,), moment)[0] for moment in (fit, held))
        return held_out / fitted if fitted > 0 else None


def some_rows(weight: Tensor) -> Tensor:
    """At most `ROWS` rows of `weight`, evenly spaced: those that a gap is measured on."""
    rows = min(ROWS, len(weight))
    return weight[torch.arange(rows, device=weight.device) * len(weight) // rows]


def few(tokens: int, features: int) -> bool:
    """Whether `tokens` are too few for `features` inputs to go unmeasured."""
    return tokens < ENOUGH * features


def few_tokens_notes(rows: Iterable[tuple[int, int, float | None]]) -> tuple[str, ...]:
    """One line for each width whose gap is `TOLD` or more. rows: (width, tokens, gap or None) of every linear."""
    found: dict[tuple[int, int], list[float]] = {}
    for width, tokens, gap in rows:
        if gap is not None:
            found.setdefault((width, tokens), []).append(gap)
    notes = []
    for (width, tokens), gaps in sorted(found.items()):
        mean = sum(gaps) / len(gaps)
        if mean >= TOLD:
            notes.append(
                f"{tokens} calibration tokens are few for layers of {width} inputs ({tokens / width:.1f} per input): their "
                f"error is {mean:.2f} times as large on held-out windows as on those fitted; give more (--num-samples)"
            )
    return tuple(notes)
