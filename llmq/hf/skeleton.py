"""A model without data: built on meta from its config, with the dtypes of a loaded model.

Buffers that no file holds (rotary tables, position ids, embedding scales) are computed by transformers' own
`initialize_weights`, as in `from_pretrained`, but while every parameter is still on meta. Some initializers write into
parameters; here they cannot overwrite weights that are already loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights

from llmq.errors import LlmqError


def build_skeleton(
    make: Callable[..., PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of `config` on meta, in eval mode, with no weights tied.

    make: builds the model from the config and `dtype=`.
    Every parameter and buffer has the dtype in which `from_pretrained(dtype=dtype)` would load it.
    """
    with torch.device("meta"), no_tie_weights():
        model = make(config, dtype=dtype)
    kept = {
        re.compile(glob.replace("*", ".*")): kept_dtype for glob, kept_dtype in model._get_dtype_plan(dtype).items()
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        for pattern, kept_dtype in kept.items():
            if pattern.search(name):
                tensor.data = torch.empty_like(tensor, dtype=kept_dtype)
    model.requires_grad_(False)
    model.eval()
    return model


def compute_buffers(model: PreTrainedModel, device: torch.device, missing: Iterable[str]) -> None:
    """Allocate every buffer that no file holds and let transformers compute its value.

    model: its parameters must be on meta. missing: names of persistent buffers that the checkpoint lacks.
    Raises `LlmqError` for a buffer that transformers leaves uncomputed.
    """
    missing = set(missing)
    allocated: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{prefix}.{name}" if prefix else name
            if buffer is None:
                continue
            if name in module._non_persistent_buffers_set or full in missing:
                allocated[full] = module._buffers[name] = torch.empty_like(buffer, device=device)
                if buffer.is_floating_point():
                    allocated[full].fill_(torch.nan)  # so that a buffer that is not computed is noticed
            else:
                buffer._is_hf_initialized = True
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    for full, buffer in allocated.items():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise LlmqError(
                f"transformers does not compute {full} of {type(model).__name__}; "
                "load the model with from_pretrained and use the loaded model"
            )


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's modules that holds the very tensors of `model`."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
