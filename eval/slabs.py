"""Logits of whole windows in slabs of rows, so that the peak memory does not grow with window times vocabulary.

Models differ in what they do around the output head (granite divides the logits, cohere multiplies them, gemma2 caps
them), so none of it is reimplemented here. The decoder runs once per batch and a hook keeps its output. Then the model's
*own* forward is called once per slab, with a decoder that returns the rows of the slab:

    model(ids) ──► decoder(ids) ──► hidden [batch, window, H]           once per batch
    model(ids) ──► (decoder returns hidden[:, a:b]) ──► head ──► logits  once per slab

Before the first window, this is compared with the plain forward on the window's first 64 tokens. If the two differ (a
head that mixes positions, a decoder that is not found), the plain forward computes all logits of a batch at once, which a
note reports; they are still handed out in slabs. Slabs depend on the vocabulary and the window alone, never on free
memory, the batch size or the way in which logits are computed: those of two models with one vocabulary always match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmq.eval.base import Slab
from llmq.eval.models import input_device

SLAB_LOGITS = 1 << 24  # elements: 64 MiB of float32
CHECK_TOKENS = 64
CHECK_ROWS = 24  # does not divide 64, so that the last slab is a shorter one
CHECK_TOLERANCE = 0.01  # of the largest logit: bfloat16 rounds by 0.4%, a head that mixes positions is far off

Slabs = Callable[[Tensor], Iterator[Slab]]


def logits_in_slabs(model: nn.Module, first: Tensor, vocabulary: int | None = None) -> tuple[Slabs, tuple[str, ...]]:
    """A function: ids int64 `[batch, window]` -> all slabs, windows in order; and a note if all logits are computed at once.

    first: one window `[1, tokens]`, on which the computation in slabs is checked.
    vocabulary: what the size of slabs follows from (default: the number of the model's logits).
    This and the returned function must be called within `evaluation_mode`.
    """
    device = input_device(model)
    sample = first[:, :CHECK_TOKENS].to(device)
    logits = model(input_ids=sample, use_cache=False).logits.float()
    rows = max(1, SLAB_LOGITS // (vocabulary or logits.shape[-1]))
    decoder = next((module for module in _decoders(model) if _is_separable(model, module, sample, logits)), None)
    if decoder is None:
        note = "logits were computed all at once: the model's head cannot be run on slabs of rows"
        return (lambda ids: _whole(model, ids.to(device), rows)), (note,)
    return (lambda ids: _slabbed(model, decoder, ids.to(device), rows)), ()


def _whole(model: nn.Module, ids: Tensor, rows: int) -> Iterator[Slab]:
    logits = model(input_ids=ids, use_cache=False).logits
    for index in range(len(ids)):
        parts = torch.split(logits[index, :-1], rows)
        for part, targets in zip(parts, torch.split(ids[index, 1:], rows), strict=True):
            yield Slab(index, part, targets.to(part.device))


def _slabbed(model: nn.Module, decoder: nn.Module, ids: Tensor, rows: int) -> Iterator[Slab]:
    hidden = _decode(model, decoder, ids)
    for index, window in enumerate(torch.split(ids, 1)):
        # Slabs are cut per window, so that they do not change with the batch size.
        parts = torch.split(hidden.last_hidden_state[index : index + 1, :-1], rows, dim=1)
        for part, targets in zip(parts, torch.split(window[0, 1:], rows), strict=True):
            logits = _head(model, decoder, hidden, window, part)[0]
            yield Slab(index, logits, targets.to(logits.device))


def _decoders(model: nn.Module) -> list[nn.Module]:
    """Candidates for the module whose output the head reads: `base_model`, or OPT's `base_model.decoder`."""
    find = getattr(model, "get_decoder", None)
    candidates = (getattr(model, "base_model", None), find() if find is not None else None)
    return [module for module in candidates if isinstance(module, nn.Module) and module is not model]


def _is_separable(model: nn.Module, decoder: nn.Module, ids: Tensor, expected: Tensor) -> bool:
    """Whether slabs through the model's own forward give the `expected` logits `[1, tokens, vocabulary]`."""
    try:
        output = _decode(model, decoder, ids)
        if output is None:
            return False
        slabs = torch.split(output.last_hidden_state, CHECK_ROWS, dim=1)
        logits = torch.cat([_head(model, decoder, output, ids, rows).float() for rows in slabs], dim=1)
    except (RuntimeError, IndexError):  # a head that needs all positions: the plain forward has just worked
        return False
    if logits.shape != expected.shape:
        return False
    # Masked logits are -inf in both, and -inf - -inf is NaN. Any other difference of infinities, or a NaN, fails the check.
    difference = (logits - expected).abs_().masked_fill_(logits == expected, 0.0)
    largest = expected.abs().masked_fill_(expected.isinf(), 0.0).max()
    return bool(difference.max() <= CHECK_TOLERANCE * largest)


def _decode(model: nn.Module, decoder: nn.Module, ids: Tensor) -> Any:
    """The decoder's output in the model's own call; None if `_head` cannot use it."""
    outputs: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            return None
        outputs.append(output)
        return _with_rows(output, output.last_hidden_state[:, :1])  # these logits are not used

    handle = decoder.register_forward_hook(keep)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return outputs[0] if len(outputs) == 1 else None


def _with_rows(output: Any, rows: Tensor) -> Any:
    """A copy of transformers' `ModelOutput`, a dataclass, with other hidden rows."""
    return dataclasses.replace(output, last_hidden_state=rows)


def _head(model: nn.Module, decoder: nn.Module, output: Any, ids: Tensor, rows: Tensor) -> Tensor:
    """Logits `[1, n, vocabulary]` of hidden rows `[1, n, H]`: the model's forward with a decoder that returns the rows."""
    # accelerate stores its hooks as the instance's `forward`, which is restored afterwards.
    own = vars(decoder).pop("forward", None)
    vars(decoder)["forward"] = lambda *_args, **_kwargs: _with_rows(output, rows)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        del vars(decoder)["forward"]
        vars(decoder).update({} if own is None else {"forward": own})
    return logits
