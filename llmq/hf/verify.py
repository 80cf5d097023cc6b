"""Check a quantized checkpoint against its config and the model: headers before loading, values after.

transformers loads a checkpoint whose packed tensors are missing, misshapen or of another dtype without an error, and
computes with whatever happens to be in memory. Here every quantized linear must have exactly the tensors of its scheme,
with the dtypes and shapes that follow from the model's own N and K. No other packed tensor may be present, and whatever
else of the model is stored must have the model's shapes. Stored names are those that `save_pretrained` gives
(`llmq.hf.stored_names`); a prefix of the base model may be absent, as transformers allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from llmq.blocks.transposed import as_linear, transposed_linears
from llmq.checkpoint.reader import Checkpoint
from llmq.core.scheme import Scheme
from llmq.errors import LlmqError
from llmq.formats.base import Format, Layout, TensorSpec, check_specs, matches
from llmq.hf.experts import take_apart_packed
from llmq.hf.stored_names import plan_names


class NotOurs(Exception):
    """Why a sound checkpoint cannot run packed in this model, so that another loader must take it."""


@dataclass(frozen=True)
class PackedLinear:
    """One linear of the model that the config quantizes."""

    name: str
    """Its module name in the model."""
    stored: str
    """Its name in the files."""
    shape: tuple[int, int]
    """Of its weight: (N, K)."""
    scheme: Scheme
    """How it is quantized. The scales' dtype is the one found in the files."""
    bias: torch.dtype | None
    """The dtype of its bias in the model; None without one."""


def find_linears(
    model: PreTrainedModel, stored_format: Format, layout: Layout, checkpoint: Checkpoint | None
) -> list[PackedLinear]:
    """Every linear of `model` (on meta, still dense) that `layout` quantizes, checked against the files' headers.

    checkpoint: None where a state dict is loaded and there are no files; scales then have the dtype that the format
    chooses for the model's. Raises `LlmqError` naming the tensor, what is expected and what was found.
    """
    if checkpoint is None:
        return _found(model, stored_format, layout, None, {})
    apart, undo = take_apart_packed(model, _renamed(model), checkpoint.tensors, stored_format.tensor_names)
    names, scale = _stored_names(model, checkpoint), stored_format.scale_name
    transposed = {
        name: module
        for name, module in transposed_linears(model).items()
        if f"{names[f'{name}.weight'].removesuffix('weight')}{scale}" in checkpoint.tensors
    }
    for name, module in transposed.items():
        model.set_submodule(name, as_linear(module))
    try:
        return _found(model, stored_format, layout, checkpoint, apart)
    except NotOurs:  # stock transformers loads it
        undo()
        for name, module in transposed.items():
            model.set_submodule(name, module)
        raise


def _found(
    model: PreTrainedModel,
    stored_format: Format,
    layout: Layout,
    checkpoint: Checkpoint | None,
    apart: Mapping[str, str],
) -> list[PackedLinear]:
    """As `find_linears`. apart: the stored names of linears of experts, which are taken apart."""
    names = _stored_names(model, checkpoint) | {f"{name}.weight": f"{stored}.weight" for name, stored in apart.items()}
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stored = names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
            scheme = _scheme(name, stored, module, stored_format, layout, checkpoint)
            if scheme is None or (checkpoint is not None and _is_new(model, name, stored, stored_format, checkpoint)):
                continue
            if checkpoint is not None:
                scheme = replace(scheme, scale_dtype=_scale_dtype(checkpoint, stored, stored_format, scheme))
            shape = (module.out_features, module.in_features)
            bias = None if module.bias is None else module.bias.dtype
            linears.append(PackedLinear(name, stored, shape, scheme, bias))
    if checkpoint is not None:
        _check_packed(checkpoint, stored_format, linears, model)
        _check_dense(checkpoint, model, names)
    if not linears:
        raise NotOurs("the quantization_config of this checkpoint matches no linear of the model")
    return linears


def _renamed(model: PreTrainedModel) -> Mapping[str, str]:
    state = model.state_dict()
    return plan_names(model, {name: tensor.dtype for name, tensor in state.items()}, [list(state)]).renamed


def _scheme(
    name: str, stored: str, module: nn.Linear, stored_format: Format, layout: Layout, checkpoint: Checkpoint | None
) -> Scheme | None:
    """How a linear is quantized; None if it stays dense.

    Configs name modules as the files do or as they are in memory. A linear that the files do not hold packed is ignored
    if either name is (a tied head has no name in files); one that they hold has the scheme of whichever name has one.
    """
    classes = [base.__name__ for base in type(module).__mro__]
    dtype = stored_format.scale_dtype(module.weight.dtype)
    called = tuple(dict.fromkeys((stored, name)))
    schemes = [layout.scheme_for(each, classes, dtype) for each in called]
    packed = checkpoint is not None and f"{stored}.{stored_format.scale_name}" in checkpoint.tensors
    if not packed and any(matches(pattern, each, classes) for pattern in layout.ignore for each in called):
        return None
    if checkpoint is not None and f"{stored}.weight" in checkpoint.tensors and None in schemes:
        return None
    return next((scheme for scheme in schemes if scheme is not None), None)


def _is_new(model: PreTrainedModel, name: str, stored: str, stored_format: Format, checkpoint: Checkpoint) -> bool:
    """Whether a linear is a head that the files hold nothing of: transformers initializes it, and says so."""
    locals_ = ("weight", *stored_format.reserved_names)
    if any(f"{stored}.{local}" in checkpoint.tensors for local in locals_):
        return False
    base = model.base_model
    return base is not model and not name.startswith(f"{model.base_model_prefix}.")


def _stored_names(model: PreTrainedModel, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Name in the state dict -> name in the files, for every tensor that is stored unchanged."""
    names = dict(_renamed(model))
    if checkpoint is None:
        return names
    short = f"{model.base_model_prefix}."
    heads = {key.rpartition(".")[0] for key in checkpoint.tensors}
    for name, stored in names.items():
        for other in (name, stored.removeprefix(short), short + stored):
            if stored.rpartition(".")[0] not in heads and other.rpartition(".")[0] in heads:
                names[name] = other
    return names


def _scale_dtype(checkpoint: Checkpoint, stored: str, stored_format: Format, scheme: Scheme) -> torch.dtype:
    """The dtype of a linear's scales in the files."""
    name = f"{stored}.{stored_format.scale_name}"
    scale = checkpoint.tensors.get(name)
    if scale is None:
        dense = f"{stored}.weight" in checkpoint.tensors
        note = f", but {stored}.weight is present: the config says that this linear is quantized" if dense else ""
        raise LlmqError(f"{checkpoint.folder}: {name} is missing{note}")
    reason = stored_format.refusal(replace(scheme, scale_dtype=scale.dtype))
    if reason:
        raise LlmqError(f"{checkpoint.folder}: {name}: {stored_format.name} {reason}")
    return scale.dtype


def _check_packed(
    checkpoint: Checkpoint, stored_format: Format, linears: list[PackedLinear], model: PreTrainedModel
) -> None:
    """Raise unless the files hold exactly the packed tensors that the linears need.

    Packed tensors of something else in the model, such as experts that it holds as one parameter, raise `NotOurs`. A
    complete linear that the model does not have (a layer left out, a head of another task) is left to transformers,
    which reports it. All else raises `LlmqError`.
    """
    by_module: dict[str, dict[str, TensorSpec]] = {}
    for key, tensor in checkpoint.tensors.items():
        owner, _, local = key.rpartition(".")
        by_module.setdefault(owner, {})[local] = TensorSpec(tensor.dtype, tensor.shape)
    for linear in linears:
        found = by_module.pop(linear.stored)
        expected = stored_format.specs(linear.shape, linear.scheme)
        if linear.bias is not None:
            # A bias is cast to the model's dtype while loading, so any floating dtype will do.
            stored = found.get("bias")
            dtype = stored.dtype if stored is not None and stored.dtype.is_floating_point else linear.bias
            expected["bias"] = TensorSpec(dtype, linear.shape[:1])
        check_specs(found, expected, f"{checkpoint.folder}: {linear.stored}.")
    packed = {
        owner: tensors for owner, tensors in by_module.items() if set(tensors) & set(stored_format.reserved_names)
    }
    if not packed:
        return
    state = model.state_dict()
    plan = plan_names(model, {name: tensor.dtype for name, tensor in state.items()}, [list(state)]).plan
    own = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for owner, tensors in packed.items():
        planned = plan.get(f"{owner}.weight")
        if planned is not None and planned.parameter not in own:
            raise NotOurs(f"{owner} is stored packed, and {type(model).__name__} has no linear of that name")
        local = next(local for local in tensors if local in stored_format.reserved_names)
        complete = {*stored_format.metadata_names, stored_format.scale_name, stored_format.tensor_names[0]} <= set(
            tensors
        )
        if planned is not None or not complete:
            raise LlmqError(
                f"{checkpoint.folder}: {owner}.{local} belongs to no linear that the config quantizes in this model"
            )


def _check_dense(checkpoint: Checkpoint, model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Check the shapes of dense tensors: transformers 5.17 accepts any shape when a quantizer is active."""
    for name, parameter in model.named_parameters():
        key = names.get(name, name)
        stored = checkpoint.tensors.get(key)
        if stored is not None and stored.shape != tuple(parameter.shape):
            shapes = f"must be {list(parameter.shape)}; got {list(stored.shape)}"
            raise LlmqError(f"{checkpoint.folder}: {key} {shapes}")
