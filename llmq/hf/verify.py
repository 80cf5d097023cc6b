"""Is a quantized checkpoint what its config and the model say? Headers before loading, values after.

transformers loads a checkpoint whose packed tensors are missing, misshaped or of another dtype without an error, and
computes with what happens to be in memory. Here every quantized linear must have exactly its tensors, with the dtypes
and shapes that follow from the model's own N and K; no other packed tensor may be there; what is stored of the rest of
the model must have the model's shapes. Stored names are those that `save_pretrained` gives (`llmq.hf.stored_names`); a prefix
of the base model may be absent, as transformers allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.checkpoint.reader import Checkpoint, StoredTensor
from llmq.core.grid import Grid
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors as ct
from llmq.hf.stored_names import plan_names

SCALES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class PackedLinear:
    """One linear of the model that the config quantizes. stored: its name in the files. scale_dtype: found there."""

    name: str
    stored: str
    shape: tuple[int, int]
    grid: Grid
    scale_dtype: torch.dtype
    bias: torch.dtype | None


def find_linears(model: PreTrainedModel, layout: ct.Layout, checkpoint: Checkpoint | None) -> list[PackedLinear]:
    """Every linear of `model` (on meta, still dense) that `layout` quantizes, checked against the files' headers.

    checkpoint: None where there are no files (a state dict is loaded); scales then have the model's dtype.
    Raises `LlmqError` naming tensor, expected and found.
    """
    names = _stored_names(model, checkpoint)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        stored = names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        grid = layout.grid_for(stored, [base.__name__ for base in type(module).__mro__])
        if grid is None:
            continue
        shape = (module.out_features, module.in_features)
        bias = None if module.bias is None else module.bias.dtype
        scale = module.weight.dtype if checkpoint is None else _scale_dtype(checkpoint, stored)
        found.append(PackedLinear(name, stored, shape, grid, scale, bias))
    if not found:
        raise LlmqError("the quantization_config of this checkpoint matches no linear of the model")
    if checkpoint is not None:
        _check_packed(checkpoint, found)
        _check_dense(checkpoint, model, names)
    return found


def check_values(name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    """Raise `LlmqError` unless `weight_shape` and `weight_scale` of a linear [N, K] hold what they must."""
    stated = tensors["weight_shape"].tolist()
    if stated != list(shape):
        raise LlmqError(f"{name}.weight_shape must be {list(shape)}, as the model says; it holds {stated}")
    scale = tensors["weight_scale"]
    if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
        raise LlmqError(f"{name}.weight_scale holds NaN, inf or zero: the file is broken, download or write it again")


def _stored_names(model: PreTrainedModel, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Name in the state dict -> name in the files, of everything that is stored as it is."""
    state = model.state_dict()
    names = dict(plan_names(model, {name: tensor.dtype for name, tensor in state.items()}, [list(state)]).renamed)
    if checkpoint is None:
        return names
    short = f"{model.base_model_prefix}."
    heads = {key.rpartition(".")[0] for key in checkpoint.tensors}
    for name, stored in names.items():
        for other in (name, stored.removeprefix(short), short + stored):
            if stored.rpartition(".")[0] not in heads and other.rpartition(".")[0] in heads:
                names[name] = other
    return names


def _scale_dtype(checkpoint: Checkpoint, stored: str) -> torch.dtype:
    scale = checkpoint.tensors.get(f"{stored}.weight_scale")
    if scale is None:
        dense = f"{stored}.weight" in checkpoint.tensors
        told = f", and {stored}.weight is there: the config says that this linear is quantized" if dense else ""
        raise LlmqError(f"{checkpoint.folder}: {stored}.weight_scale is missing{told}")
    if scale.dtype not in SCALES:
        kinds = ", ".join(str(dtype) for dtype in SCALES)
        raise LlmqError(f"{checkpoint.folder}: {stored}.weight_scale must be one of {kinds}; got {scale.dtype}")
    return scale.dtype


def _check_packed(checkpoint: Checkpoint, linears: list[PackedLinear]) -> None:
    """Exactly the tensors that the linears need."""
    held: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        owner, _, local = key.rpartition(".")
        held.setdefault(owner, {})[local] = tensor
    for linear in linears:
        expected = ct.specs(linear.shape, linear.grid, linear.scale_dtype)
        if linear.bias is not None:
            # A bias is cast to the model's dtype at load: any float will do.
            stored = held[linear.stored].get("bias")
            kind = stored.dtype if stored is not None and stored.dtype.is_floating_point else linear.bias
            expected["bias"] = ct.TensorSpec(kind, linear.shape[:1])
        found = {
            key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for key, tensor in held.pop(linear.stored).items()
        }
        ct.check(found, expected, f"{checkpoint.folder}: {linear.stored}.")
    for owner, tensors in held.items():
        for local in tensors:
            if local.startswith("weight_") and (local in ct.SUFFIXES or local == "weight_g_idx"):
                raise LlmqError(
                    f"{checkpoint.folder}: {owner}.{local} belongs to no linear that the config quantizes in this model"
                )


def _check_dense(checkpoint: Checkpoint, model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Shapes of what is stored dense: transformers 5.17 takes any shape where there is a quantizer."""
    for name, parameter in model.named_parameters():
        key = names.get(name, name)
        stored = checkpoint.tensors.get(key)
        if stored is not None and stored.shape != tuple(parameter.shape):
            told = f"must be {list(parameter.shape)}; got {list(stored.shape)}"
            raise LlmqError(f"{checkpoint.folder}: {key} {told}")
