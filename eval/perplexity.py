"""Perplexity by the GPTQ paper's protocol: exp of the mean negative log-likelihood over full windows of one text.

Protocol (IST-DASLab/gptq, `datautils.py` and `llama.py`): the text is tokenized once and cut into non-overlapping
windows of 2048 tokens or the model's context; the tail is dropped. Attention and positions restart in every window, and
a window's first token is never predicted. Where the tokenizer begins a text with a BOS, every window begins with it, since
some models are far off without; the protocol says so. The loss is computed in float32 and summed in float64.
`bits_per_byte` is the figure that compares models with different tokenizers.

Left out: strided windows, lm-eval's word perplexity, llama.cpp's half windows, padding. Models, ids and tokenizers are
values: no library but torch is imported.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.base import Column, ScoredText, Slab, TextMetric, decimals
from llmq.eval.scoring import score
from llmq.eval.windows import standard_error

MAX_NATS = 700  # exp of more overflows float64


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of one model on one text.

    Fields:
        value: perplexity per token.
        stderr: standard error of `value`, from the spread of the window means; None for one window.
        bits_per_byte: bits per UTF-8 byte of the scored text; None without a tokenizer.
        tokens: number of predicted tokens: windows * (window - 1).
        windows: number of windows.
        window: tokens per window.
        protocol: how it was measured, one line.
        window_nats: mean negative log-likelihood of each window, in nats; for `paired_difference`.
        fingerprint: hash of the scored token ids; results with different fingerprints are for different tokens.
        notes: deviations from what was requested (window reduced to the context, logits not in slabs).
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

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without those of single windows."""
        return {
            "perplexity": self.value,
            "stderr": self.stderr,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "windows": self.windows,
            "window": self.window,
            "protocol": self.protocol,
        }


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    window: int = 2048,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Any = None,
) -> Perplexity:
    """The perplexity of `model` on `token_ids` int64 `[tokens]`.

    Parameters and errors: see `llmq.eval.scoring.score`. A loss that is NaN or inf raises `LlmqError` with its window.
    """
    results = score(
        (PERPLEXITY,),
        model,
        token_ids,
        window=window,
        limit=limit,
        batch_size=batch_size,
        progress=progress,
        tokenizer=tokenizer,
    )
    result: Perplexity = results[PERPLEXITY.name]
    return result


def comparable(a: Perplexity, b: Perplexity) -> bool:
    """Whether the two were measured on the same windows of the same tokens."""
    return (a.fingerprint, a.window) == (b.fingerprint, b.window)


def paired_difference(a: Perplexity, b: Perplexity) -> tuple[float, float | None]:
    """(b.value - a.value, its standard error), paired by window. The error is None for one window.

    Delta method: d(ppl_b - ppl_a) = ppl_b * d(nats_b) - ppl_a * d(nats_a), so the error is that of the mean over the
    windows of ppl_b * nats_b[i] - ppl_a * nats_a[i]. What makes a window hard for both models cancels.

    Raises `LlmqError` if the two were not measured on the same windows of the same tokens.
    """
    if not comparable(a, b):
        raise LlmqError(
            f"a paired difference needs the same windows of the same tokens: one has {a.windows} of {a.window} "
            f"(ids {a.fingerprint}), the other {b.windows} of {b.window} (ids {b.fingerprint}); "
            f"evaluate both on one text with one tokenizer and one window"
        )
    pairs = zip(a.window_nats, b.window_nats, strict=True)
    return b.value - a.value, standard_error([b.value * nats_b - a.value * nats_a for nats_a, nats_b in pairs])


def _sums(slab: Slab, original: Slab | None) -> tuple[float]:
    """Sum of -log p of the targets: float32 terms, float64 sum."""
    losses = F.cross_entropy(slab.logits.float(), slab.targets, reduction="none")
    return (float(losses.cpu().double().sum()),)


def _check(window: int, means: tuple[float, ...]) -> None:
    if not means[0] < MAX_NATS:  # true for NaN
        raise LlmqError(
            f"the loss must be a number below {MAX_NATS} nats; window {window} (counted from 0) has {means[0]}; "
            f"evaluate in bfloat16 or float32, and look for NaN or inf in the model's weights"
        )


def _summarize(text: ScoredText, means: Sequence[tuple[float, ...]]) -> Perplexity:
    nats = [mean for (mean,) in means]
    mean = math.fsum(nats) / len(nats)
    value = math.exp(mean)
    count, window = text.ids.shape
    return Perplexity(
        value=value,
        stderr=standard_error([value * window_nats for window_nats in nats]),
        bits_per_byte=_bits_per_byte(text.tokenizer, text.ids[:, text.begin :], mean),
        tokens=count * (window - 1),
        windows=count,
        window=window,
        protocol=f"GPTQ: {count} non-overlapping windows of {window}, tokenized once, loss in float32, tail dropped"
        + (", each window begins with the tokenizer's BOS" if text.begin else ""),
        window_nats=tuple(nats),
        fingerprint=hashlib.sha256(text.ids.numpy().tobytes()).hexdigest()[:16],
        notes=text.notes,
    )


def _bits_per_byte(tokenizer: Any, ids: Tensor, mean_nats: float) -> float | None:
    """Bits per predicted token over bytes per token; the bytes are those of all tokens of the windows, first ones included.

    Special tokens stand for no text, and clean-up would remove the spaces before punctuation marks.
    """
    if tokenizer is None:
        return None
    text = tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    size = len(text.encode("utf-8", errors="replace"))
    return mean_nats / math.log(2) * ids.numel() / size if size else None


def _comparison(first: Perplexity, other: Perplexity) -> dict[str, Any]:
    if not comparable(first, other):
        return {}
    difference, error = paired_difference(first, other)
    return {"to_first": difference, "to_first_stderr": error}


def _difference(result: Perplexity, first: Perplexity) -> str:
    compared = {} if result is first else _comparison(first, result)
    return f"{compared['to_first']:+.3f}" if compared else ""


def _difference_error(result: Perplexity, first: Perplexity) -> str:
    compared = {} if result is first else _comparison(first, result)
    return decimals(compared["to_first_stderr"]) if compared else ""


def _notes(results: Sequence[Perplexity]) -> tuple[str, ...]:
    notes = dict.fromkeys(note for result in results for note in result.notes)
    if all(comparable(results[0], result) for result in results):
        return tuple(notes)
    return ("the models were not measured on the same tokens: compare bits/byte, not perplexity", *notes)


PERPLEXITY = TextMetric(
    name="perplexity",
    sums=_sums,
    check=_check,
    summarize=_summarize,
    columns=(
        Column("perplexity", lambda result, first: decimals(result.value)),
        Column("± s.e.", lambda result, first: decimals(result.stderr)),
        Column("vs. first", _difference),
        Column("± s.e.", _difference_error),
        Column("bits/byte", lambda result, first: decimals(result.bits_per_byte, 4)),
    ),
    comparison=_comparison,
    notes=_notes,
)
