"""Logits of whole windows in slabs of rows, so that a vocabulary of 150,000 words does not decide the peak memory.

Models differ in what they do around the output head (granite divides the logits, cohere multiplies them, gemma2 caps
them), so none of it is rebuilt here. The decoder runs once, its output is caught by a hook, and the model's *own* forward
is then called for every slab with the decoder answering with the slab's rows:

    model(ids) ──► decoder(ids) ──► hidden [1, window, H]          once per batch
    model(ids) ──► (answers hidden[:, a:b]) ──► head ──► logits    once per slab

Before the first window this is compared with the plain forward on its first 64 tokens. Where it differs (a head that
mixes positions, a decoder that is not found) the plain forward is used for everything and a note says so. Slab sizes
depend on the vocabulary alone, never on free memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmq.eval.models import input_device

SLAB_LOGITS = 1 << 24  # elements: 64 MiB of float32
CHECK_TOKENS = 64
CHECK_ROWS = 24  # not a divisor of 64: the last slab is a shorter one
CHECK_TOLERANCE = 0.01  # of the largest logit: bfloat16 rounds by 0.4%, a head that mixes positions is far off


@dataclasses.dataclass(frozen=True)
class Slab:
    """Logits `[n, vocabulary]` of n consecutive positions of window `window` (counted in its batch), and the ids `[n]` that
    follow those positions, on the logits' device. A window's last position predicts nothing and is never among them."""

    window: int
    logits: Tensor
    targets: Tensor


Slabs = Callable[[Tensor], Iterator[Slab]]


def logits_in_slabs(model: nn.Module, first: Tensor) -> tuple[Slabs, tuple[str, ...]]:
    """The function ids int64 `[batch, window]` -> every slab, windows in order; and a note where it needs all logits at once.

    first: a window `[1, tokens]` on which the way of computing them is checked. Call both within `evaluation_mode`.
    """
    device = input_device(model)
    sample = first[:, :CHECK_TOKENS].to(device)
    logits = model(input_ids=sample, use_cache=False).logits.float()
    decoder = next((found for found in _decoders(model) if _is_separable(model, found, sample, logits)), None)
    if decoder is None:
        note = "logits were computed all at once: the model's head cannot be run on slabs of rows"
        return (lambda ids: _whole(model, ids.to(device))), (note,)
    rows = max(1, SLAB_LOGITS // logits.shape[-1])
    return (lambda ids: _slabbed(model, decoder, ids.to(device), rows)), ()


def _whole(model: nn.Module, ids: Tensor) -> Iterator[Slab]:
    logits = model(input_ids=ids, use_cache=False).logits
    for index in range(len(ids)):
        yield Slab(index, logits[index, :-1], ids[index, 1:].to(logits.device))


def _slabbed(model: nn.Module, decoder: nn.Module, ids: Tensor, rows: int) -> Iterator[Slab]:
    hidden = _decode(model, decoder, ids)
    for index, window in enumerate(torch.split(ids, 1)):
        # Slabs are cut per window, so that they do not change with the batch size.
        parts = torch.split(hidden.last_hidden_state[index : index + 1, :-1], rows, dim=1)
        for part, targets in zip(parts, torch.split(window[0, 1:], rows), strict=True):
            logits = _head(model, decoder, hidden, window, part)[0]
            yield Slab(index, logits, targets.to(logits.device))


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
