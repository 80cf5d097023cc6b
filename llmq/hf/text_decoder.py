"""Where the text decoder lies in a model: the module that runs the decoder blocks, its name and its config.

The decoder of a causal LM is transformers' `base_model`. That of a wrapper (vision-language, audio) lies deeper: it is the
innermost module that holds the embedding of tokens and the blocks (`llmq.blocks.capture.find_decoder`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmq.blocks.capture import find_decoder


@dataclass(frozen=True)
class TextDecoder:
    """The part of a model that maps token ids to hidden states."""

    module: nn.Module
    """Called as `module(input_ids=..., use_cache=...)`. It runs all decoder blocks and no output head."""
    name: str
    """The module's dotted name in the model; empty where it is the model itself."""
    config: PreTrainedConfig
    """The config that describes it: the model's own, or the text part of it."""


def text_decoder(config: PreTrainedConfig, model: PreTrainedModel) -> TextDecoder:
    """The text decoder of `model`. config: the model's."""
    text = config.get_text_config(decoder=True)
    if text is not config:
        name, module = find_decoder(model)
        return TextDecoder(module, name, text)
    base = model.base_model
    return TextDecoder(base, "" if base is model else model.base_model_prefix, text)
