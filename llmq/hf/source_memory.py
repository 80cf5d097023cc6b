"""A loaded model as a source, without changing it.

The source works on a copy of the model's structure that shares the caller's tensors. Loading replaces tensors of that
copy. Outside the blocks it puts tensors of the right dtype and device (the caller's own if they already are right;
nothing writes to them). In a block it puts copies, which the caller of `load_block` may change. Everything that is not
a tensor is copied with the structure, so that eval mode and config changes do not reach the caller's model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.hf.sidefiles import SideFiles
from llmq.hf.skeleton import build_skeleton, sharing_copy
from llmq.hf.source_base import Source, quiet


class InMemorySource(Source):
    """A loaded model. See `Source`."""

    streamed = False

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: str | torch.device,
        side: SideFiles,
        description: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        _refuse_scattered(model)
        shared = sharing_copy(model)
        shared.eval()
        shared.config.dtype = dtype
        fresh = _built_anew(shared, dtype)
        _refuse_unlike(shared, fresh)
        super().__init__(shared, dtype, device, side, description, notes)
        self._originals = list(self._blocks)
        self._cast = _loaded_dtypes(shared, fresh, model.dtype, dtype)

    def load_outer(self) -> None:
        moved: dict[int, nn.Parameter] = {}  # by id of the original, so that tied parameters stay one object
        for prefix, module in self.model.named_modules():
            if f"{prefix}.".startswith(f"{self.blocks_name}."):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in moved:
                        moved[id(parameter)] = self._moved(f"{prefix}.{name}".lstrip("."), parameter)
                    module._parameters[name] = moved[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    full = f"{prefix}.{name}".lstrip(".")
                    module._buffers[name] = buffer.to(self.device, self._cast.get(full, buffer.dtype))

    def load_block(self, index: int) -> nn.Module:
        original, prefix = self._originals[index], f"{self.blocks_name}.{index}"
        copies: dict[int, Tensor] = {}
        for name, parameter in original.named_parameters():
            copies[id(parameter)] = self._moved(f"{prefix}.{name}", parameter, copied=True)
        for name, buffer in original.named_buffers():
            dtype = self._cast.get(f"{prefix}.{name}", buffer.dtype)
            copies[id(buffer)] = buffer.detach().to(self.device, dtype, copy=True)
        block: nn.Module = copy.deepcopy(original, copies)
        self._blocks[index] = block
        return block

    def release_block(self, index: int) -> None:
        self._blocks[index] = self._originals[index]

    def _dtypes(self) -> Mapping[str, torch.dtype]:
        return self._cast

    def _moved(self, name: str, parameter: Tensor, copied: bool = False) -> nn.Parameter:
        tensor = parameter.detach().to(self.device, self._cast.get(name, parameter.dtype), copy=copied)
        return nn.Parameter(tensor, requires_grad=False)


def _built_anew(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model on meta that `from_pretrained` would build from the config of `model`."""
    try:
        with quiet():
            return build_skeleton(type(model)._from_config, copy.deepcopy(model.config), dtype)
    except Exception as error:  # constructors raise anything on odd values
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LlmqError(
            f"{type(model).__name__} cannot be built from its own config ({type(error).__name__}: {reason}); correct model.config"
        ) from error


def _refuse_unlike(model: PreTrainedModel, fresh: PreTrainedModel) -> None:
    """Raise `LlmqError` if what is written could not be loaded: where `model` is not what its config builds.

    fresh: the model that the config builds. The message names the first tensor that differs.
    """
    name, remedy = type(model).__name__, "change model.config to describe the model, or the model back to its config"
    held, built = model.state_dict(), fresh.state_dict()
    tied = fresh.all_tied_weights_keys
    for key in (*built, *held):
        if key not in held or key not in built:
            has, lacks = (
                ("the config builds", "the model lacks")
                if key in built
                else ("the model holds", "its config does not build")
            )
            raise LlmqError(f"{name} must be as its config describes it: {has} {key}, which {lacks}; {remedy}")
        if held[key].shape != built[key].shape and key not in tied:  # tying replaces these, whatever their shapes
            raise LlmqError(
                f"{name} must be as its config describes it: {key} is {list(held[key].shape)}, its config builds "
                f"{list(built[key].shape)}; {remedy}"
            )
    for target, source in tied.items():
        one, other = held.get(target), held.get(source)
        if one is not None and other is not None and one.data_ptr() != other.data_ptr() and not torch.equal(one, other):
            raise LlmqError(
                f"{name} must be as its config describes it: the config ties {target} to {source}, but their values differ; "
                "set model.config.tie_word_embeddings to False"
            )


def _loaded_dtypes(
    model: PreTrainedModel, fresh: PreTrainedModel, native: torch.dtype, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype of every parameter and buffer after the model is cast from `native` to `dtype`.

    It is the dtype in which `from_pretrained` would load it: some models keep some parameters in float32. A tensor that
    the model's class does not create is cast if it has the model's dtype.
    """
    state = _tensors(model)
    if dtype == native:
        return {name: tensor.dtype for name, tensor in state.items()}
    built = _tensors(fresh)
    dtypes = {}
    for name, tensor in state.items():
        known = built.get(name)
        dtypes[name] = known.dtype if known is not None else dtype if tensor.dtype == native else tensor.dtype
    return dtypes


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


def _refuse_scattered(model: PreTrainedModel) -> None:
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise LlmqError(
            "a loaded model must be on one device; this one is spread over several by its device_map; "
            "load it without device_map or use its folder"
        )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type == "meta":
            raise LlmqError(
                f"a loaded model must have its weights in memory; {name} is on meta (offloaded or not loaded); "
                "load it without offloading or use its folder"
            )
