"""How much worse a layer does on windows that it was not rounded for: measured where calibration tokens are few.

GPTQ knows the second moment of a layer's K inputs from some tokens, and moves errors to where those tokens do not see them.
The fewer tokens there are for K, the more of its gain is lost on any other text. Where there are fewer than
`MIN_TOKENS_PER_INPUT` per input, the moment of the last quarter of the windows is gathered once more by itself,
`llmq.methods.base.SAMPLED_ROWS` rows of the weight are rounded again, against the other windows only, and

    holdout ratio = output error on the held-out windows / output error on the windows that were fitted

The weights that are written come from all tokens, and are the same to the bit whether the ratio is measured or not. It
overstates a little, since it is that of the fitted windows alone. Where there are enough tokens nothing is measured.

SmolLM2-135M in general position, GPTQ int4 g64, WikiText-2 in windows of 512; the mean of 30 blocks:

    windows                             4       8      16
    q, k, v (576 inputs): per input   3.6     7.1      14       ratio  3.0    1.9    1.28
    down_proj (1536 inputs)           1.3     2.7     5.3       ratio  9.7    4.2    1.90

It falls as inputs over tokens, and reaches `REPORT_FROM` at about `MIN_TOKENS_PER_INPUT`. Measuring costs 15% of such a short
run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from llmq.blocks.statistics import Statistics
from llmq.methods.base import Rounding, Target, output_errors

MIN_TOKENS_PER_INPUT = 16
REPORT_FROM = 1.25
"""Ratios from here on become a note of the run."""


def is_undersampled(tokens: int, features: int) -> bool:
    """Whether `tokens` calibration tokens are few for `features` inputs."""
    return tokens < MIN_TOKENS_PER_INPUT * features


def without_held_out(statistics: Statistics) -> Statistics | None:
    """The statistics of the tokens that are not held out; None where all or none of them are.

    Uses up `statistics`: its Hessian is overwritten, since a third K x K matrix would decide the peak of a run.
    """
    held_out, count = statistics.held_out, statistics.held_out_tokens
    rest = statistics.tokens - count
    if held_out is None or not 0 < count < statistics.tokens:
        return None
    fitted = statistics.hessian.mul_(statistics.tokens).sub_(held_out, alpha=count).div_(rest)
    fitted.diagonal().clamp_min_(0)  # an input that only held-out tokens have leaves rounding errors of either sign
    return replace(statistics, hessian=fitted, tokens=rest)


def holdout_ratio(weight: Tensor, fitted: Statistics, target: Target, rounding: Rounding) -> float | None:
    """The ratio of `weight` float32 [n, K], rounded against `fitted` (`without_held_out`); None where that has no error.

    Raises `LlmqError` where it cannot be rounded.
    """
    held_out = fitted.held_out
    assert held_out is not None
    rounded = rounding(weight, fitted, target).weight
    seen, unseen = (output_errors(weight, (rounded,), moment)[0] for moment in (fitted.hessian, held_out))
    return unseen / seen if seen > 0 else None


def few_tokens_notes(rows: Iterable[tuple[int, int, float | None]]) -> tuple[str, ...]:
    """One line for each width whose mean ratio is `REPORT_FROM` or more. rows: (width, tokens, ratio or None) of each linear."""
    found: dict[tuple[int, int], list[float]] = {}
    for width, tokens, ratio in rows:
        if ratio is not None:
            found.setdefault((width, tokens), []).append(ratio)
    notes = []
    for (width, tokens), ratios in sorted(found.items()):
        mean = sum(ratios) / len(ratios)
        if mean >= REPORT_FROM:
            notes.append(
                f"layers with {width} inputs saw only {tokens} calibration tokens ({tokens / width:.1f} per input); "
                f"their held-out error is {mean:.2f}x the fitted error; raise --num-samples"
            )
    return tuple(notes)
