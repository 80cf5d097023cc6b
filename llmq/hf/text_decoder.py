"""Where the text decoder lies in a model: the module that runs the decoder blocks, its name and its config.

This is the only file that knows. Today's models are causal LMs, whose decoder is transformers' `base_model`; a
vision-language wrapper, whose language model lies deeper, will be found here too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


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
    module = model.base_model
    name = "" if module is model else model.base_model_prefix
    return TextDecoder(module, name, config.get_text_config(decoder=True))
