"""Perplexity by the GPTQ paper's protocol: exp of the mean negative log-likelihood over full windows of one text.

Protocol (IST-DASLab/gptq, `datautils.py` and `llama.py`): the text is tokenised once, cut into non-overlapping windows
of 2048 tokens or the model's context, the tail is dropped; attention and positions start afresh in every window and its
first token is never predicted. The loss is computed in float32 and summed in float64. `bits_per_byte` is the figure
that compares models with different tokenizers.

Logits come in slabs of rows (`eval/slabs.py`), so that a vocabulary of 150,000 words does not decide the peak. Left out:
strided windows, lm-eval's word perplexity, llama.cpp's half windows, padding. Models, ids and tokenizers are values: no
library but torch is imported.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.models import evaluation_mode
from llmq.eval.slabs import Slab, logits_in_slabs
from llmq.eval.windows import cut_windows, standard_error

MAX_NATS = 700  # exp of more is no float64


@dataclass(frozen=True)
class Perplexity:
    """What one model says about one text.

    value: perplexity per token.
    stderr: standard error of `value` from the spread of the window means; None for one window.
    bits_per_byte: bits per UTF-8 byte of the scored text; None where no tokenizer was given.
    tokens: predicted tokens: windows * (window - 1).
    windows, window: how many windows, of how many tokens.
    protocol: one line that says how it was measured.
    window_nats: mean negative log-likelihood of each window, in nats, for `paired_difference`.
    fingerprint: of the scored token ids; figures with different ones were not measured on the same tokens.
    notes: what was unusual (window reduced to the context, logits not in slabs).
    seconds: wall time.
    """

    value: float
    stderr: float | None
    bits_per_byte: float | None
    tokens: int
    windows: int
    window: int
    protocol: str
    window_nats: tuple[float, ...]
    fingerprint: str
    notes: tuple[str, ...]
    seconds: float


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    window: int = 2048,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Any = None,
) -> Perplexity:
    """The perplexity of `model` on `token_ids`.

    model: called as `model(input_ids=[batch, window], use_cache=False).logits`; put in eval mode meanwhile.
    token_ids: int64 `[tokens]`, the whole text tokenised once.
    window: tokens per window; a longer one than the model's context is reduced to it (see `notes`).
    limit: the first so many windows only.
    batch_size: windows per forward; changes the speed, and the figure by no more than rounding.
    progress: called with (windows done, windows in all) after each batch.
    tokenizer: its `decode` counts the bytes for `bits_per_byte`.

    Raises `LlmqError` for sizes below their minimum, ids that are no flat stream or outside the vocabulary, a text
    shorter than one window, and a loss that is NaN or inf (naming the window).
    """
    started = time.perf_counter()
    if batch_size < 1:
        raise LlmqError(f"batch_size must be at least 1; got {batch_size}")
    ids, notes = cut_windows(model, token_ids, window, limit)  # [n, window]
    nats: list[float] = []
    with evaluation_mode(model):
        slabs, unslabbed = logits_in_slabs(model, ids[:1])
        for start in range(0, len(ids), batch_size):
            nats += _window_means(slabs(ids[start : start + batch_size]))
            check_finite(nats, start)
            if progress is not None:
                progress(len(nats), len(ids))
    return summary(nats, ids, notes + unslabbed, tokenizer, started)


def summary(nats: Sequence[float], ids: Tensor, notes: tuple[str, ...], tokenizer: Any, started: float) -> Perplexity:
    """The result out of each window's mean loss in nats. ids: int64 `[n, window]`; started: of `time.perf_counter`."""
    window = ids.shape[1]
    mean = math.fsum(nats) / len(nats)
    value = math.exp(mean)
    return Perplexity(
        value=value,
        stderr=standard_error([value * window_nats for window_nats in nats]),
        bits_per_byte=_bits_per_byte(tokenizer, ids, mean),
        tokens=ids.numel() - len(ids),
        windows=len(ids),
        window=window,
        protocol=f"GPTQ: {len(ids)} non-overlapping windows of {window}, tokenised once, loss in float32, tail dropped",
        window_nats=tuple(nats),
        fingerprint=hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def comparable(a: Perplexity, b: Perplexity) -> bool:
    """Whether the two were measured on the same windows of the same tokens."""
    return (a.fingerprint, a.window) == (b.fingerprint, b.window)


def paired_difference(a: Perplexity, b: Perplexity) -> tuple[float, float | None]:
    """(b.value - a.value, its standard error), the windows being compared in pairs.

    Delta method: d(ppl_b - ppl_a) = ppl_b * d(nats_b) - ppl_a * d(nats_a), so the error is that of the mean over the
    windows of ppl_b * nats_b[i] - ppl_a * nats_a[i]. What makes a window hard for both cancels. None for one window.

    Raises `LlmqError` where the two were not measured on the same windows of the same tokens.
    """
    if not comparable(a, b):
        raise LlmqError(
            f"a paired difference needs the same windows of the same tokens: one has {a.windows} of {a.window} "
            f"(ids {a.fingerprint}), the other {b.windows} of {b.window} (ids {b.fingerprint}); "
            f"evaluate both on one text with one tokenizer and one window"
        )
    pairs = zip(a.window_nats, b.window_nats, strict=True)
    return b.value - a.value, standard_error([b.value * nats_b - a.value * nats_a for nats_a, nats_b in pairs])


def _window_means(slabs: Iterator[Slab]) -> list[float]:
    """Mean nats per predicted token of every window."""
    means = []
    for _, parts in itertools.groupby(slabs, key=lambda slab: slab.window):
        found = [(summed_nats(slab), len(slab.targets)) for slab in parts]
        means.append(math.fsum(nats for nats, _ in found) / sum(count for _, count in found))
    return means


def summed_nats(slab: Slab) -> float:
    """Summed -log p of the targets: float32 terms, float64 sum."""
    losses = F.cross_entropy(slab.logits.float(), slab.targets, reduction="none")
    return float(losses.cpu().double().sum())


def check_finite(nats: list[float], start: int) -> None:
    """Raise `LlmqError` for a mean loss from window `start` on that is NaN, inf or beyond what a perplexity can say."""
    for index in range(start, len(nats)):
        if not nats[index] < MAX_NATS:  # NaN is not
            raise LlmqError(
                f"the loss must be a number below {MAX_NATS} nats; window {index} (counted from 0) has {nats[index]}; "
                f"evaluate in bfloat16 or float32, and look for NaN or inf in the model's weights"
            )


def _bits_per_byte(tokenizer: Any, ids: Tensor, mean_nats: float) -> float | None:
    """Bits per predicted token over bytes per token, the latter over all tokens of the windows, first ones included.

    Special tokens stand for no text, and clean-up would swallow the spaces before punctuation marks.
    """
    if tokenizer is None:
        return None
    text = tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    size = len(text.encode("utf-8", errors="replace"))
    return mean_nats / math.log(2) * ids.numel() / size if size else None
