"""Running the decoder of a source: to capture what its blocks are given, and to learn which linears share an input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from llmq.blocks.capture import Captured, capture, foreign_code
from llmq.blocks.stacks import find_stacks
from llmq.blocks.topology import Group, input_groups, model_groups, structure
from llmq.errors import LlmqError
from llmq.hf.skeleton import sharing_copy
from llmq.hf.source_base import Source
from llmq.hf.text_decoder import text_decoder

PROBE_TOKENS = 16
UNRUNNABLE = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""What a model may raise that is run without data."""


def run_decoder(model: PreTrainedModel, ids: Tensor) -> object:
    """Run the decoder of `model`, without its head and without caches, on token ids [batch, tokens] of any device."""
    device = model.get_input_embeddings().weight.device
    return text_decoder(model.config, model).module(input_ids=ids.to(device), use_cache=False)


def capture_blocks(source: Source, batches: Sequence[Tensor]) -> Captured:
    """What every block of `source` is given for batches of token ids. What lies outside the blocks must be loaded."""
    with foreign_code(f"{type(source.model).__name__} cannot be run with its blocks left out"):
        return capture(source.model, partial(run_decoder, source.model), batches)


def probe_ids(model: PreTrainedModel) -> Tensor:
    """A few token ids, int64 [1, PROBE_TOKENS], of the model's vocabulary."""
    return torch.arange(PROBE_TOKENS).remainder(model.config.get_text_config().vocab_size)[None]


def shared_inputs(model: PreTrainedModel, blocks: Collection[str]) -> dict[str, tuple[Group, ...]]:
    """Which linears of each block share an input, from one forward of the model; one that lies on meta is run on fake tensors.

    blocks: their names. Raises what the model raises.
    """
    ids = probe_ids(model)
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model_groups(model, partial(run_decoder, model), ids, blocks)
    model = sharing_copy(model)  # modules may keep what they compute
    for name in dict.fromkeys(stack.module for stack in find_stacks(model)):
        model.set_submodule(name, _WithoutExperts())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model_groups(model, partial(run_decoder, model), mode.from_tensor(ids.to("meta")), blocks)


class _WithoutExperts(nn.Module):
    """Stands for a module of experts where only shapes matter: which expert gets which tokens depends on data."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros_like(given)


def find_shared_inputs(source: Source, blocks: Collection[str]) -> dict[str, tuple[Group, ...]]:
    """`shared_inputs` of a source. Of a model on disk no weight is read for it.

    Where a model cannot be run like that, one block of each structure is loaded and run.
    Raises `LlmqError` for a model that cannot be run at all.
    """
    try:
        return shared_inputs(source.model, blocks)
    except LlmqError:
        raise
    except UNRUNNABLE:
        source.load_outer()
    probe = capture_blocks(source, [probe_ids(source.model)])
    known: dict[tuple[object, ...], tuple[Group, ...]] = {}
    groups: dict[str, tuple[Group, ...]] = {}
    for index in range(len(source)):
        name = f"{source.blocks_name}.{index}"
        if name not in blocks:
            continue
        built = structure(source.model.get_submodule(name))
        if built not in known:
            block = source.load_block(index)
            with foreign_code(f"{name} cannot be run on what the model gives it"):
                known[built] = input_groups(block, probe.calls[index][0], probe.hidden[0])
            source.release_block(index)
        groups[name] = known[built]
    return groups
