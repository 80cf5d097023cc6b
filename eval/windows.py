"""A text's tokens as the windows that an evaluation scores; and the standard error over windows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.models import context_length, vocabulary_size


def cut_windows(
    models: Sequence[nn.Module], token_ids: Tensor, window: int, limit: int | None, begin: Sequence[int] = ()
) -> tuple[Tensor, tuple[str, ...]]:
    """The first `limit` non-overlapping windows, int64 `[n, window]` on the CPU, without the tail of the text; and notes.

    models: all models that will read the windows. A window longer than the smallest context is reduced to it, with a
        note.
    token_ids: int64 `[tokens]`. begin: ids that every window begins with, which the text itself does not hold.
    Raises `LlmqError` for sizes below their minimum, ids that are not a flat int64 stream or not in the vocabulary, and a
    text shorter than one window.
    """
    window, notes = _fit_to_context(models, window)
    if limit is not None and limit < 1:
        raise LlmqError(f"limit must be at least 1; got {limit}")
    if token_ids.dim() != 1 or token_ids.dtype != torch.int64:
        raise LlmqError(f"token_ids must be int64 [tokens]; got {token_ids.dtype} {list(token_ids.shape)}")
    own = window - len(begin)  # tokens of the text in a window
    if own < 1:
        raise LlmqError(
            f"window must be longer than the {len(begin)} tokens that each window begins with; got {window}"
        )
    if len(token_ids) < own:
        raise LlmqError(
            f"an evaluation needs at least one full window: the text has {len(token_ids)} tokens, a window has {own}; "
            f"use a longer text or a smaller window"
        )
    count = len(token_ids) // own if limit is None else min(len(token_ids) // own, limit)
    ids = token_ids[: count * own].cpu().contiguous().view(count, own)
    if begin:
        ids = torch.cat((torch.tensor(list(begin), dtype=torch.int64).expand(count, -1), ids), 1)
    vocabulary = min((size for model in models if (size := vocabulary_size(model)) is not None), default=None)
    if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise LlmqError(
            f"token ids must be in the model's vocabulary of {vocabulary}; they range from {ids.min()} to {ids.max()}; "
            f"use the tokenizer of this model"
        )
    return ids, notes


def standard_error(terms: Sequence[float]) -> float | None:
    """Standard error of the mean of `terms`; None for one term."""
    return statistics.stdev(terms) / math.sqrt(len(terms)) if len(terms) > 1 else None


def _fit_to_context(models: Sequence[nn.Module], window: int) -> tuple[int, tuple[str, ...]]:
    if window < 2:
        raise LlmqError(f"window must be at least 2 (a window's first token is never predicted); got {window}")
    context = context_length(*models)
    if context is None or window <= context:
        return window, ()
    return context, (f"window reduced from {window} to the model's context of {context} tokens",)
