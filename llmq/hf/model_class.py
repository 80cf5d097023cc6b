"""The class of transformers that builds the model which a config describes.

A checkpoint names its class in `architectures`. A wrapper around a language model (vision, audio) has a class of its own
that holds the towers as well; `AutoModelForCausalLM` has none for most of them, or builds the text part alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that predicts tokens for `config`: the one that `architectures` names, else a wrapper's, else a causal LM's.

    None if transformers has no such class for the type of the config.
    """
    found = list(_candidates(config))
    named = [each for each in getattr(config, "architectures", None) or () if isinstance(each, str)]
    return next((each for each in found if each.__name__ in named), found[0] if found else None)


def _candidates(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes that transformers registers for the config's type and that predict tokens; wrappers first."""
    tables = (modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING)
    for table in tables:
        if type(config) in table:
            entry = table[type(config)]
            yield from entry if isinstance(entry, tuple) else (entry,)
