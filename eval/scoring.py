"""One pass over a text's windows that serves all text metrics.

    ids [n, window] -> batches -> slabs of logits (of the model; of the original too, if a metric needs it)
        each metric: sums per slab -> means per window -> checked after each batch -> result

The slabs of both models cover the same positions (`llmq.eval.slabs`). Sums are float64; a window's mean is the exact sum
of its slabs' sums over its number of predicted positions, so it does not depend on the batch size beyond the rounding
of the model itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.base import ScoredText, Slab, TextMetric
from llmq.eval.models import evaluation_mode, vocabulary_size
from llmq.eval.slabs import logits_in_slabs
from llmq.eval.windows import cut_windows

PADDING = 1024
"""The most tokens by which a vocabulary is taken to be padded."""

SlabPair = tuple[Slab, Slab | None]
Means = tuple[float, ...]


def score(
    metrics: Sequence[TextMetric[Any]],
    model: nn.Module,
    token_ids: Tensor,
    *,
    original: nn.Module | None = None,
    window: int = 2048,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Any = None,
    begin: Sequence[int] = (),
) -> dict[str, Any]:
    """The result of each metric for `model` on `token_ids`, by the metric's name.

    model: called as `model(input_ids=[batch, window], use_cache=False).logits`; in eval mode during the pass.
    token_ids: int64 `[tokens]`, the whole text tokenized once.
    original: the model that `model` was made from, for metrics that compare the two.
    window: tokens per window; reduced to the smallest context of the models, with a note.
    limit: the maximum number of windows; the first ones of the text are used.
    batch_size: windows per forward; it changes the speed, and the results only by rounding.
    progress: called with (windows done, windows in total) after each batch.
    tokenizer: counts the bytes of the text, for bits per byte.
    begin: ids that every window begins with, such as a BOS; `token_ids` does not hold them.

    Raises `LlmqError` for sizes below their minimum, ids that are not a flat int64 stream or not in the vocabulary, a
    text shorter than one window, models with different vocabularies, and values that a metric refuses (with the window).

    (Over 50 lines: signature and docstring are half of them.)
    """
    if batch_size < 1:
        raise LlmqError(f"batch_size must be at least 1; got {batch_size}")
    models = _check_models(metrics, model, original)
    ids, notes = cut_windows(models, token_ids, window, limit, begin)  # [n, window]
    means: dict[str, list[Means]] = {metric.name: [] for metric in metrics}
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(evaluation_mode(each))
        sizes = [size for each in models if (size := vocabulary_size(each)) is not None]
        padded = max(sizes) if len(set(sizes)) > 1 else None  # slabs of both models must cover the same rows
        slabs, slab_notes = zip(*(logits_in_slabs(each, ids[:1], padded) for each in models), strict=True)
        if padded is not None:
            notes = (*notes, f"vocabularies of {sizes[0]} and {sizes[1]}: compared on the first {min(sizes)} tokens")
        done = 0
        for batch in torch.split(ids, batch_size):
            for pairs in _by_window([slabs_of(batch) for slabs_of in slabs]):
                for metric, window_means in zip(metrics, _window_means(metrics, pairs, ids.shape[1] - 1), strict=True):
                    means[metric.name].append(window_means)
            for metric in metrics:
                for index in range(done, done + len(batch)):
                    metric.check(index, means[metric.name][index])
            done += len(batch)
            if progress is not None:
                progress(done, len(ids))
    text = ScoredText(ids, tokenizer, tuple(dict.fromkeys((*notes, *itertools.chain(*slab_notes)))), len(begin))
    return {metric.name: metric.summarize(text, means[metric.name]) for metric in metrics}


def _check_models(
    metrics: Sequence[TextMetric[Any]], model: nn.Module, original: nn.Module | None
) -> tuple[nn.Module, ...]:
    """The models that the metrics need: the model, and the original if one of them compares with it."""
    comparing = [metric.name for metric in metrics if metric.needs_original]
    if not comparing:
        return (model,)
    if original is None:
        raise LlmqError(f"{comparing[0]} needs the original model; got None")
    sizes = vocabulary_size(original), vocabulary_size(model)
    if sizes[0] is not None and sizes[1] is not None and not _padded_only(sizes[0], sizes[1]):
        raise LlmqError(
            f"{comparing[0]} needs models with the same vocabulary, up to padding of at most {PADDING} tokens: the original "
            f"has {sizes[0]} tokens, the other model {sizes[1]}; compare with the model that it was made from"
        )
    return model, original


def _padded_only(a: int, b: int) -> bool:
    """Whether two sizes of a vocabulary may differ by padding alone."""
    return abs(a - b) <= min(PADDING, min(a, b) // 2)


def _by_window(slabs: Sequence[Iterator[Slab]]) -> Iterator[Iterator[SlabPair]]:
    """For each window of a batch, its slabs: (the model's, the original's or None)."""
    pairs: Iterator[SlabPair] = (
        ((slab, None) for slab in slabs[0]) if len(slabs) == 1 else zip(slabs[0], slabs[1], strict=True)
    )
    return (group for _, group in itertools.groupby(pairs, key=lambda pair: pair[0].window))


def _window_means(metrics: Sequence[TextMetric[Any]], pairs: Iterator[SlabPair], positions: int) -> Iterator[Means]:
    """For each metric, the means of its sums over the predicted positions of one window."""
    sums: list[list[Means]] = [[] for _ in metrics]
    for slab, original in pairs:  # outermost, so that one slab of logits is alive at a time
        for metric, collected in zip(metrics, sums, strict=True):
            collected.append(metric.sums(slab, original))
    for collected in sums:
        yield tuple(math.fsum(terms) / positions for terms in zip(*collected, strict=True))
