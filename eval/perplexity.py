"""Perplexity by the GPTQ paper's protocol: exp of the mean negative log-likelihood over full windows of one text.

Protocol (IST-DASLab/gptq, `datautils.py` and `llama.py`): the text is tokenised once, cut into non-overlapping windows
of 2048 tokens or the model's context, the tail is dropped; attention and positions start afresh in every window and its
first token is never predicted. The loss is computed in float32 and summed in float64. `bits_per_byte` is the figure
that compares models with different tokenizers.

Logits come in slabs of rows, so that a vocabulary of 150,000 words does not decide the peak. Models differ in what they
do around the output head (granite divides the logits, cohere multiplies them, gemma2 caps them), so none of it is
rebuilt here. The decoder runs once, its output is caught by a hook, and the model's *own* forward is then called for
every slab with the decoder answering with the slab's rows:

    model(ids) ──► decoder(ids) ──► hidden [1, window, H]          once per batch
    model(ids) ──► (answers hidden[:, a:b]) ──► head ──► logits    once per slab

Before the first window this is compared with the plain forward on its first 64 tokens. Where it differs (a head that
mixes positions, a decoder that is not found) the plain forward is used for everything and `notes` says so. Slab sizes
depend on the vocabulary alone, never on free memory. Left out: strided windows, lm-eval's word perplexity, llama.cpp's
half windows, padding. Models, ids and tokenizers are values: no library but torch is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.errors import LlmqError

SLAB_LOGITS = 1 << 24  # elements: 64 MiB of float32
CHECK_TOKENS = 64
CHECK_ROWS = 24  # not a divisor of 64: the last slab is a shorter one
MAX_NATS = 700  # exp of more is no float64
CHECK_TOLERANCE = 0.01  # of the largest logit: bfloat16 rounds by 0.4%, a head that mixes positions is far off


@dataclasses.dataclass(frozen=True)
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
    window, notes = _fit_to_context(model, window)
    ids = _cut(model, token_ids, window, limit, batch_size)  # [n, window]
    nats: list[float] = []
    with evaluation_mode(model):
        score, unslabbed = _scorer(model, ids[:1])
        for start in range(0, len(ids), batch_size):
            nats += score(ids[start : start + batch_size])
            _check_finite(nats, start)
            if progress is not None:
                progress(len(nats), len(ids))
    mean = math.fsum(nats) / len(nats)
    value = math.exp(mean)
    return Perplexity(
        value=value,
        stderr=_standard_error([value * window_nats for window_nats in nats]),
        bits_per_byte=_bits_per_byte(tokenizer, ids, mean),
        tokens=ids.numel() - len(ids),
        windows=len(ids),
        window=window,
        protocol=f"GPTQ: {len(ids)} non-overlapping windows of {window}, tokenised once, loss in float32, tail dropped",
        window_nats=tuple(nats),
        fingerprint=hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
        notes=notes + unslabbed,
        seconds=time.perf_counter() - started,
    )


def paired_difference(a: Perplexity, b: Perplexity) -> tuple[float, float | None]:
    """(b.value - a.value, its standard error), the windows being compared in pairs.

    Delta method: d(ppl_b - ppl_a) = ppl_b * d(nats_b) - ppl_a * d(nats_a), so the error is that of the mean over the
    windows of ppl_b * nats_b[i] - ppl_a * nats_a[i]. What makes a window hard for both cancels. None for one window.

    Raises `LlmqError` where the two were not measured on the same windows of the same tokens.
    """
    if (a.fingerprint, a.window) != (b.fingerprint, b.window):
        raise LlmqError(
            f"a paired difference needs the same windows of the same tokens: one has {a.windows} of {a.window} "
            f"(ids {a.fingerprint}), the other {b.windows} of {b.window} (ids {b.fingerprint}); "
            f"evaluate both on one text with one tokenizer and one window"
        )
    pairs = zip(a.window_nats, b.window_nats, strict=True)
    return b.value - a.value, _standard_error([b.value * nats_b - a.value * nats_a for nats_a, nats_b in pairs])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def context_length(model: nn.Module) -> int | None:
    """Positions that the model's config admits; None where it names no limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the model's input embedding; None where it has no `get_input_embeddings`."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find(), "weight", None) if find is not None else None
    return len(weight) if isinstance(weight, Tensor) else None


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameter that has memory (offloaded ones are on meta)."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _fit_to_context(model: nn.Module, window: int) -> tuple[int, tuple[str, ...]]:
    if window < 2:
        raise LlmqError(f"window must be at least 2 (a window's first token is never predicted); got {window}")
    context = context_length(model)
    if context is None or window <= context:
        return window, ()
    return context, (f"window reduced from {window} to the model's context of {context} tokens",)


def _cut(model: nn.Module, token_ids: Tensor, window: int, limit: int | None, batch_size: int) -> Tensor:
    """The checked windows: int64 `[n, window]` on the CPU."""
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise LlmqError(f"{name} must be at least 1; got {value}")
    if token_ids.dim() != 1 or token_ids.dtype != torch.int64:
        raise LlmqError(f"token_ids must be int64 [tokens]; got {token_ids.dtype} {list(token_ids.shape)}")
    if len(token_ids) < window:
        raise LlmqError(
            f"perplexity needs at least one full window: the text has {len(token_ids)} tokens, a window has {window}; "
            f"use a longer text or a smaller window"
        )
    count = len(token_ids) // window if limit is None else min(len(token_ids) // window, limit)
    ids = token_ids[: count * window].cpu().contiguous().view(count, window)
    words = vocabulary_size(model)
    if words is not None and not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise LlmqError(
            f"token ids must lie in the model's vocabulary of {words}; they go from {ids.min()} to {ids.max()}; "
            f"use the tokenizer of this model"
        )
    return ids


def _scorer(model: nn.Module, first: Tensor) -> tuple[Callable[[Tensor], list[float]], tuple[str, ...]]:
    """The function ids `[batch, window]` -> mean nats per window, and a note where it needs all logits at once."""
    device = input_device(model)
    sample = first[:, :CHECK_TOKENS].to(device)
    logits = model(input_ids=sample, use_cache=False).logits.float()
    decoder = next((found for found in _decoders(model) if _is_separable(model, found, sample, logits)), None)
    if decoder is None:
        note = "logits were computed all at once: the model's head cannot be run on slabs of rows"
        return (lambda ids: _plain_nats(model, ids.to(device))), (note,)
    rows = max(1, SLAB_LOGITS // logits.shape[-1])
    return (lambda ids: _slabbed_nats(model, decoder, ids.to(device), rows)), ()


def _decoders(model: nn.Module) -> list[nn.Module]:
    """What may be the module whose output the head reads: `base_model`, or OPT's `base_model.decoder`."""
    find = getattr(model, "get_decoder", None)
    found = (getattr(model, "base_model", None), find() if find is not None else None)
    return [module for module in found if isinstance(module, nn.Module) and module is not model]


def _is_separable(model: nn.Module, decoder: nn.Module, ids: Tensor, expected: Tensor) -> bool:
    """Whether slabs through the model's own forward give the `expected` logits `[1, tokens, vocabulary]`."""
    try:
        output = _decode(model, decoder, ids)
        if output is None:
            return False
        slabs = torch.split(output.last_hidden_state, CHECK_ROWS, dim=1)
        logits = torch.cat([_head(model, decoder, output, ids, rows).float() for rows in slabs], dim=1)
    except (RuntimeError, IndexError):  # a head that wants all positions: the plain forward just worked
        return False
    return logits.shape == expected.shape and bool(
        (logits - expected).abs().max() <= CHECK_TOLERANCE * expected.abs().max()
    )


def _decode(model: nn.Module, decoder: nn.Module, ids: Tensor) -> Any:
    """The decoder's output as the model's own call makes it; None where it is none that `_head` can answer with."""
    caught: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            return None
        caught.append(output)
        return _with_rows(output, output.last_hidden_state[:, :1])  # nobody reads these logits

    handle = decoder.register_forward_hook(keep)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return caught[0] if len(caught) == 1 else None


def _with_rows(output: Any, rows: Tensor) -> Any:
    """A copy of transformers' `ModelOutput`, a dataclass, with other hidden rows."""
    return dataclasses.replace(output, last_hidden_state=rows)


def _head(model: nn.Module, decoder: nn.Module, output: Any, ids: Tensor, rows: Tensor) -> Tensor:
    """Logits `[1, n, vocabulary]` of hidden rows `[1, n, H]`: the model's forward, its decoder answering with them."""
    # accelerate keeps its hooks in the instance's `forward`: what stood there is put back.
    own = vars(decoder).pop("forward", None)
    vars(decoder)["forward"] = lambda *_args, **_kwargs: _with_rows(output, rows)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        del vars(decoder)["forward"]
        vars(decoder).update({} if own is None else {"forward": own})
    return logits


def _slabbed_nats(model: nn.Module, decoder: nn.Module, ids: Tensor, rows: int) -> list[float]:
    output = _decode(model, decoder, ids)
    means = []
    for hidden, window in zip(torch.split(output.last_hidden_state, 1), torch.split(ids, 1), strict=True):
        # The last position predicts nothing. Slabs are cut per window, so that they do not change with the batch size.
        slabs = zip(torch.split(hidden[:, :-1], rows, dim=1), torch.split(window[0, 1:], rows), strict=True)
        nats = [_nats(_head(model, decoder, output, window, slab)[0], targets) for slab, targets in slabs]
        means.append(math.fsum(nats) / (window.numel() - 1))
    return means


def _plain_nats(model: nn.Module, ids: Tensor) -> list[float]:
    logits = model(input_ids=ids, use_cache=False).logits
    return [_nats(logits[i, :-1], ids[i, 1:]) / (ids.shape[1] - 1) for i in range(len(ids))]


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Summed -log p of `targets` `[n]` under `logits` `[n, vocabulary]`: float32 terms, float64 sum."""
    losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return float(losses.cpu().double().sum())


def _standard_error(terms: list[float]) -> float | None:
    """Of the mean of `terms`; None for one term."""
    return statistics.stdev(terms) / math.sqrt(len(terms)) if len(terms) > 1 else None


def _check_finite(nats: list[float], start: int) -> None:
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
