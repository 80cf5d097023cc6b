"""How far a model's predictions are from those of the original that it was made from: KL per token and top-1 agreement.

    KL = mean over tokens of  sum_v p(v) (log p(v) - log q(v)),   p of the original, q of the other model, in float32

The windows and the pass are those of perplexity (`llmq.eval.scoring`). All next-token probabilities count, not only that
of the text's token, so KL is far less noisy than a difference of perplexities. It is reported with the standard error of
the window means. Where the vocabulary of one model is padded, both distributions are those over the common tokens, and
a note says so. A token that both models exclude (logit -inf, as for the padding of a vocabulary) adds 0; one that only
the other model excludes makes KL infinite, which is an error.

Left out: other distances, tables per token, logits stored on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.base import Column, ScoredText, Slab, TextMetric, decimals
from llmq.eval.scoring import score
from llmq.eval.windows import standard_error


@dataclass(frozen=True)
class Divergence:
    """The divergence of one model from its original on one text.

    Fields:
        kl: nats per token.
        kl_stderr: standard error of `kl`, from the spread of the window means; None for one window.
        top1: share of tokens, 0 to 1, for which both models have the same most likely next token.
        top1_stderr: standard error of `top1`, likewise.
        tokens: number of compared positions: windows * (window - 1).
        windows: number of windows.
        window: tokens per window.
        window_kl: mean KL of each window.
        notes: deviations from what was requested, such as vocabularies of different sizes.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None
    tokens: int
    windows: int
    window: int
    window_kl: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without those of single windows."""
        return {"kl": self.kl, "kl_stderr": self.kl_stderr, "top1": self.top1, "top1_stderr": self.top1_stderr}


def divergence(
    original: nn.Module,
    other: nn.Module,
    token_ids: Tensor,
    window: int = 2048,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """The divergence of `other` from `original` on `token_ids` int64 `[tokens]`.

    Parameters and errors: see `llmq.eval.scoring.score`. Infinite or NaN KL raises `LlmqError` with its window.
    """
    results = score(
        (DIVERGENCE,),
        other,
        token_ids,
        original=original,
        window=window,
        limit=limit,
        batch_size=batch_size,
        progress=progress,
    )
    result: Divergence = results[DIVERGENCE.name]
    return result


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) in nats of each row: float32 [n] from logits [n, vocabulary].

    0 log 0 is 0: where p is exactly 0 (logit -inf) a token adds nothing, whatever q is. Where q is exactly 0 and p is not,
    the row is inf. Rows with NaN or +inf logits are NaN.
    """
    log_p, log_q = torch.log_softmax(p_logits.float(), -1), torch.log_softmax(q_logits.float(), -1)
    p_is_zero = log_p == -math.inf
    # Separate from the sum: p may underflow to 0 where log p is finite, and 0 * inf is NaN.
    infinite = ((log_q == -math.inf) & ~p_is_zero).any(-1)
    difference = torch.sub(log_p, log_q, out=log_q).masked_fill_(p_is_zero, 0.0)
    kl: Tensor = torch.linalg.vecdot(log_p.exp_(), difference)
    return kl.masked_fill_(infinite, math.inf)


def _sums(slab: Slab, original: Slab | None) -> tuple[float, float]:
    """Sum of KL in nats, and the number of equal top-1 tokens."""
    assert original is not None
    p = original.logits.float()
    q = slab.logits.float().to(p.device)
    common = min(p.shape[-1], q.shape[-1])  # a vocabulary may be padded in one of the models
    p, q = p[..., :common], q[..., :common]
    same = int((p.argmax(-1) == q.argmax(-1)).sum())
    return float(kl_divergence(p, q).cpu().double().sum()), float(same)


def _check(window: int, means: tuple[float, ...]) -> None:
    if not math.isfinite(means[0]):
        raise LlmqError(
            f"KL must be finite; window {window} (counted from 0) has {means[0]}: a model's logits contain NaN or inf, or "
            f"the model excludes a token (logit -inf) that the original allows"
        )


def _summarize(text: ScoredText, means: Sequence[tuple[float, ...]]) -> Divergence:
    kl, top1 = zip(*means, strict=True)
    count, window = text.ids.shape
    return Divergence(
        kl=math.fsum(kl) / count,
        kl_stderr=standard_error(kl),
        top1=math.fsum(top1) / count,
        top1_stderr=standard_error(top1),
        tokens=count * (window - 1),
        windows=count,
        window=window,
        window_kl=kl,
        notes=text.notes,
    )


DIVERGENCE = TextMetric(
    name="divergence",
    needs_original=True,
    sums=_sums,
    check=_check,
    summarize=_summarize,
    columns=(
        Column("KL", lambda result, first: decimals(result.kl, 4)),
        Column("± s.e.", lambda result, first: decimals(result.kl_stderr, 4)),
        Column("same top-1", lambda result, first: f"{result.top1:.1%}"),
    ),
)
