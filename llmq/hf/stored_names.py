"""The names under which `save_pretrained` would write a model's tensors, without any data.

transformers renames and merges tensors while loading, and undoes that while saving. Its own reverse conversion is run
here over tensors on meta: one that comes out as the same object was only renamed, one that does not is computed from
one or several parameters (experts split out of a fused tensor, say). Tied weights are written once, under the name
that transformers keeps. The reverse is run again, with data, for one part of the model at a time; that the parts
together give the same names as the whole is checked beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llmq.errors import LlmqError
from llmq.formats.base import TensorSpec


@dataclass(frozen=True)
class Names:
    """plan: checkpoint name -> (name of the parameter or buffer, spec), in save order; the name is "" for a tensor that
    is computed from others. renamed: parameter or buffer -> checkpoint name, of those that are not.
    """

    plan: Mapping[str, tuple[str, TensorSpec]]
    renamed: Mapping[str, str]


def plan_names(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], parts: Sequence[Sequence[str]]) -> Names:
    """The names of `model`'s state.

    dtypes: that of every entry of the state dict, as it will be stored. parts: the entries, by part of the model.
    Raises `LlmqError` where a stored tensor is computed from several parts, so that it cannot be written part by part.
    """
    state = model.state_dict()
    meta = {
        name: torch.empty(tensor.shape, dtype=dtypes[name], device="meta")
        for name, tensor in state.items()
        if name not in (model._keys_to_ignore_on_save or ())
    }
    kept = remove_tied_weights_from_state_dict({name: state[name] for name in meta}, model)
    origin = {id(tensor): name for name, tensor in meta.items()}
    plan: dict[str, tuple[str, TensorSpec]] = {}
    renamed: dict[str, str] = {}
    for stored, tensor in _reverted(model, meta).items():
        name = origin.get(id(tensor), "")
        if name:
            renamed[name] = stored
        if not name or name in kept:
            plan[stored] = name, TensorSpec(tensor.dtype, tuple(tensor.shape))
    computed = {stored for stored, (name, _) in plan.items() if not name}
    _check_parts(model, meta, renamed, parts, computed)
    return Names(plan, renamed)


def stored_tensors(model: PreTrainedModel, names: Names, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's names and tensors of one part of the model, given its entries of the state dict."""
    rest: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in names.renamed:
            rest[name] = tensor
        elif names.renamed[name] in names.plan:
            yield names.renamed[name], tensor
    if rest:
        yield from _reverted(model, rest).items()


def _check_parts(
    model: PreTrainedModel,
    meta: Mapping[str, Tensor],
    renamed: Mapping[str, str],
    parts: Sequence[Sequence[str]],
    computed: set[str],
) -> None:
    if not computed:
        return
    found: set[str] = set()
    for part in parts:
        rest = {name: meta[name] for name in part if name in meta and name not in renamed}
        found.update(_reverted(model, rest) if rest else ())
    if found != computed:
        some = sorted(found ^ computed)[0]
        raise LlmqError(f"{some} is stored in a form that spans several blocks, and cannot be written block by block")


def _reverted(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    except (ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise LlmqError(f"transformers cannot convert {type(model).__name__} to its stored form: {error}") from error
    return reverted
