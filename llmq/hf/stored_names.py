"""The names under which `save_pretrained` would write a model's tensors, found without any data.

transformers renames and merges tensors when it loads them, and reverses that when it saves them. Its own reverse
conversion is run here on meta tensors. A tensor that comes out as the same object was only renamed; any other was
computed from one or several parameters (experts split out of a fused tensor, for example). Tied weights are written
once, under the name that transformers keeps.

Writing runs the reverse conversion again, with data, for one part of the model at a time. That the parts together give
the same names as the whole model is checked beforehand.
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
class Stored:
    """One tensor of a checkpoint, known without its data.

    Fields:
        name: the tensor's name in the checkpoint.
        parameter: the model's name of the parameter or buffer that it holds; None if it is computed from others.
        spec: dtype and shape.
    """

    name: str
    parameter: str | None
    spec: TensorSpec


@dataclass(frozen=True)
class Names:
    """How a model's parameters and buffers are named in its checkpoint.

    Fields:
        plan: every tensor that is written, by its checkpoint name, in the order of `save_pretrained`.
        renamed: parameter or buffer -> checkpoint name, for those that are stored as they are.
    """

    plan: Mapping[str, Stored]
    renamed: Mapping[str, str]


def plan_names(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], parts: Sequence[Sequence[str]]) -> Names:
    """The checkpoint names of everything in `model`'s state dict.

    dtypes: the dtype in which each entry of the state dict will be stored.
    parts: the entries of the state dict, by part of the model that is written at a time.
    Raises `LlmqError` if a stored tensor is computed from several parts, since it could not be written part by part.
    """
    state = model.state_dict()
    meta = {
        name: torch.empty(tensor.shape, dtype=dtypes[name], device="meta")
        for name, tensor in state.items()
        if name not in (model._keys_to_ignore_on_save or ())
    }
    kept = remove_tied_weights_from_state_dict({name: state[name] for name in meta}, model)
    origin = {id(tensor): name for name, tensor in meta.items()}
    plan: dict[str, Stored] = {}
    renamed: dict[str, str] = {}
    for stored, tensor in _reverted(model, meta).items():
        name = origin.get(id(tensor))
        if name is not None:
            renamed[name] = stored
        if name is None or name in kept:
            plan[stored] = Stored(stored, name, TensorSpec(tensor.dtype, tuple(tensor.shape)))
    computed = {stored.name for stored in plan.values() if stored.parameter is None}
    _check_parts(model, meta, renamed, parts, computed)
    return Names(plan, renamed)


def stored_tensors(model: PreTrainedModel, names: Names, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint names and tensors of one part of the model. state: the part's entries of the state dict."""
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
    """Raise unless the parts, converted one by one, give exactly the tensors `computed` by the whole model."""
    if not computed:
        return
    by_parts: set[str] = set()
    for part in parts:
        rest = {name: meta[name] for name in part if name in meta and name not in renamed}
        by_parts.update(_reverted(model, rest) if rest else ())
    if by_parts != computed:
        name = sorted(by_parts ^ computed)[0]
        raise LlmqError(
            f"tensors must be stored block by block; {name} of {type(model).__name__} is computed from several blocks, "
            "and such a model is not supported"
        )


def _reverted(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    except (ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise LlmqError(f"transformers cannot convert {type(model).__name__} to its stored form: {error}") from error
    return reverted
