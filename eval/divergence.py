"""How far a model's predictions are from those of the model that it was made from: token KL and top-1 agreement.

    KL = mean over tokens of  sum_v p(v) (log p(v) - log q(v)),   p of the original, q of the other, in float32

The same windows, protocol and slabs of logits as `llmq.eval.perplexity`, with both models loaded. Every token counts,
whatever the text says at its place, so the figure is far less noisy than a difference of perplexities: what a text
happens to favour cancels. Reported with the standard error of the window means. Left out: other distances, tables per
token, logits kept on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.models import evaluation_mode, vocabulary_size
from llmq.eval.slabs import Slab, logits_in_slabs
from llmq.eval.windows import cut_windows, standard_error


@dataclass(frozen=True)
class Divergence:
    """kl: nats per token; kl_stderr: of the window means, None for one window. top1: share of tokens (0 to 1) whose most
    likely next token is the same; top1_stderr likewise. tokens: compared positions. window_kl: mean of each window.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None
    tokens: int
    windows: int
    window: int
    window_kl: tuple[float, ...]


def divergence(
    original: nn.Module,
    other: nn.Module,
    token_ids: Tensor,
    window: int = 2048,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """The divergence of `other` from `original` on `token_ids` int64 `[tokens]`.

    window, limit, progress: as of `llmq.eval.perplexity.perplexity`. Both models are put in eval mode meanwhile.
    Raises `LlmqError` for what `perplexity` refuses, and for models of different vocabularies.
    """
    sizes = vocabulary_size(original), vocabulary_size(other)
    if None not in sizes and sizes[0] != sizes[1]:
        raise LlmqError(f"a divergence needs one vocabulary: the original has {sizes[0]} words, the other {sizes[1]}")
    ids, _ = cut_windows(original, token_ids, window, limit)
    kls: list[float] = []
    agreed: list[float] = []
    with evaluation_mode(original), evaluation_mode(other):
        slabs = [logits_in_slabs(model, ids[:1])[0] for model in (original, other)]
        for start in range(len(ids)):
            batch = ids[start : start + 1]
            found = [_compare(p, q) for p, q in zip(*(of(batch) for of in slabs), strict=True)]
            kls.append(math.fsum(kl for kl, _ in found) / (ids.shape[1] - 1))
            agreed.append(sum(hits for _, hits in found) / (ids.shape[1] - 1))
            if not math.isfinite(kls[-1]):
                raise LlmqError(
                    f"the divergence of window {start} (counted from 0) is {kls[-1]}: a model gives NaN or inf"
                )
            if progress is not None:
                progress(len(kls), len(ids))
    return Divergence(
        kl=math.fsum(kls) / len(kls),
        kl_stderr=standard_error(kls),
        top1=math.fsum(agreed) / len(agreed),
        top1_stderr=standard_error(agreed),
        tokens=ids.numel() - len(ids),
        windows=len(ids),
        window=ids.shape[1],
        window_kl=tuple(kls),
    )


def _compare(original: Slab, other: Slab) -> tuple[float, int]:
    """Summed KL in nats and the number of agreeing top-1 tokens of one slab."""
    p, q = (slab.logits.float().to(original.logits.device) for slab in (original, other))
    agreed = int((p.argmax(-1) == q.argmax(-1)).sum())
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    difference = torch.sub(log_p, log_q, out=log_q)
    kl = torch.linalg.vecdot(log_p.exp_(), difference)
    return float(kl.cpu().double().sum()), agreed
