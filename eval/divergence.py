"""How far a model's predictions are from those of the model that it was made from: token KL and top-1 agreement.

    KL = mean over tokens of  sum_v p(v) (log p(v) - log q(v)),   p of the original, q of the other, in float32

The same windows, protocol and slabs of logits as `llmq.eval.perplexity`, with both models loaded; the other's perplexity
comes from the same logits. Every token counts, whatever the text says at its place, so the figure is far less noisy than
a difference of perplexities: what a text happens to favour cancels. Reported with the standard error of the window means.
Left out: other distances, tables per token, logits kept on disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.models import evaluation_mode, vocabulary_size
from llmq.eval.perplexity import Perplexity, check_finite, summary, summed_nats
from llmq.eval.slabs import Slab, logits_in_slabs
from llmq.eval.windows import cut_windows, standard_error


@dataclass(frozen=True)
class Divergence:
    """kl: nats per token; kl_stderr: of the window means, None for one window. top1: share of tokens (0 to 1) whose most
    likely next token is the same; top1_stderr likewise. tokens: compared positions. window_kl: mean of each window.
    perplexity: of the other model on the same windows.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None
    tokens: int
    windows: int
    window: int
    window_kl: tuple[float, ...]
    perplexity: Perplexity


def divergence(
    original: nn.Module,
    other: nn.Module,
    token_ids: Tensor,
    window: int = 2048,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Any = None,
) -> Divergence:
    """The divergence of `other` from `original` on `token_ids` int64 `[tokens]`, and the perplexity of `other`, in one pass.

    Parameters: as of `llmq.eval.perplexity.perplexity`; a window fits the smaller of the two contexts. Both models are
    put in eval mode meanwhile. Raises `LlmqError` for what `perplexity` refuses, and for models of different vocabularies.
    """
    started = time.perf_counter()
    sizes = vocabulary_size(original), vocabulary_size(other)
    if None not in sizes and sizes[0] != sizes[1]:
        raise LlmqError(f"a divergence needs one vocabulary: the original has {sizes[0]} words, the other {sizes[1]}")
    ids, notes, parts = _windows(original, other, token_ids, window, limit, batch_size)
    found: list[_Window] = []
    with evaluation_mode(original), evaluation_mode(other):
        slabs, unslabbed = zip(*(logits_in_slabs(model, ids[:1]) for model in (original, other)), strict=True)
        for batch in parts:
            start = len(found)
            found += _compared(zip(*(of(batch) for of in slabs), strict=True), len(batch), ids.shape[1] - 1)
            _check(found, start)
            if progress is not None:
                progress(len(found), len(ids))
    kls, agreed = [window.kl for window in found], [window.agreed for window in found]
    return Divergence(
        kl=math.fsum(kls) / len(kls),
        kl_stderr=standard_error(kls),
        top1=math.fsum(agreed) / len(agreed),
        top1_stderr=standard_error(agreed),
        tokens=ids.numel() - len(ids),
        windows=len(ids),
        window=ids.shape[1],
        window_kl=tuple(kls),
        perplexity=summary([window.nats for window in found], ids, notes + unslabbed[1], tokenizer, started),
    )


def _windows(
    original: nn.Module, other: nn.Module, token_ids: Tensor, window: int, limit: int | None, batch_size: int
) -> tuple[Tensor, tuple[str, ...], tuple[Tensor, ...]]:
    """The windows `[n, window]` that fit both contexts, the notes of the shorter one, and the windows in batches."""
    if batch_size < 1:
        raise LlmqError(f"batch_size must be at least 1; got {batch_size}")
    cuts = [cut_windows(model, token_ids, window, limit) for model in (other, original)]
    ids, notes = min(cuts, key=lambda cut: cut[0].shape[1])
    return ids, notes, torch.split(ids, batch_size)


@dataclass
class _Window:
    """Means over the predicted positions of one window."""

    kl: float = 0.0
    agreed: float = 0.0
    nats: float = 0.0


def _compared(pairs: Iterable[tuple[Slab, Slab]], count: int, positions: int) -> list[_Window]:
    """The `count` windows of a batch out of the slabs of both models."""
    found = [_Window() for _ in range(count)]
    for p, q in pairs:
        kl, agreed = _compare(p, q)
        window = found[p.window]
        window.kl += kl / positions
        window.agreed += agreed / positions
        window.nats += summed_nats(q) / positions
    return found


def _check(found: Sequence[_Window], start: int) -> None:
    """Raise `LlmqError` where a figure from window `start` on is no number."""
    for index in range(start, len(found)):
        if not math.isfinite(found[index].kl):
            raise LlmqError(
                f"the divergence of window {index} (counted from 0) is {found[index].kl}: a model gives NaN or inf"
            )
    check_finite([window.nats for window in found], start)


def _compare(original: Slab, other: Slab) -> tuple[float, int]:
    """Summed KL in nats and the number of agreeing top-1 tokens of one slab."""
    p, q = (slab.logits.float().to(original.logits.device) for slab in (original, other))
    agreed = int((p.argmax(-1) == q.argmax(-1)).sum())
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    difference = torch.sub(log_p, log_q, out=log_q)
    kl = torch.linalg.vecdot(log_p.exp_(), difference)
    return float(kl.cpu().double().sum()), agreed
