"""Tiny random wrappers around language models: towers for images or sound, a projector, a text decoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from llmq.hf.model_class import model_class
from tests.tiny import HIDDEN, INTERMEDIATE, POSITIONS, VOCAB, WINDOW, randomize

LAYERS = 2
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
# Larger than the text decoder: it must not be taken for it.
_VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 8}
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 8}
_SOUND = {"max_source_positions": 16, "num_mel_bins": 8}


def _text(model_type: str, **more: Any) -> dict[str, Any]:
    return {"text_config": _TEXT | {"model_type": model_type} | more}


def _vision(model_type: str | None = None, **more: Any) -> dict[str, Any]:
    return {"vision_config": _VISION | ({"model_type": model_type} if model_type else {}) | more}


WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": _TEXT | _MROPE, "vision_config": _QWEN | {"embed_dim": 32, "hidden_size": 64}},
    "qwen2_5_vl": {
        "text_config": _TEXT | _MROPE,
        "vision_config": _QWEN | {"hidden_size": 32, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": _TEXT | _MROPE,
        "vision_config": _QWEN | {"hidden_size": 32, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    },
    "llava": _text("llama") | _vision("clip_vision_model"),
    "llava_next": _text("mistral") | _vision("clip_vision_model"),
    "mistral3": _text("mistral") | _vision("pixtral"),
    "internvl": _text("qwen2") | _vision(image_size=[16, 16], patch_size=[8, 8]),
    "paligemma": _text("gemma") | _vision("siglip_vision_model", vision_use_head=False) | {"projection_dim": 64},
    "idefics3": _text("llama") | _vision(),
    "smolvlm": _text("llama") | _vision(),
    "gemma3": {"text_config": _TEXT | _MIXED} | _vision() | {"mm_tokens_per_image": 4},
    "aya_vision": _text("cohere2", **_MIXED) | _vision("siglip_vision_model"),
    "ovis2": _text("qwen2") | _vision(hidden_stride=1),
    "voxtral": _text("llama")
    | {
        "audio_config": _SOUND
        | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    },
    "qwen2_audio": _text("qwen2")
    | {
        "audio_config": _SOUND
        | {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    },
}
"""model_type -> the arguments of its config."""

_MARKS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")


def tiny_wrapper(model_type: str) -> PreTrainedModel:
    """A random wrapper in float32, in eval mode, whose text decoder has 2 layers of the widths of `tests.tiny`."""
    marks = dict.fromkeys(_MARKS, VOCAB - 1) | {"boi_token_index": VOCAB - 2, "eoi_token_index": VOCAB - 3}
    config = AutoConfig.for_model(model_type, **marks, **WRAPPERS[model_type])
    built = model_class(config)
    assert built is not None
    torch.manual_seed(0)  # some parameters are not drawn by randomize
    model = built(config).float().eval()
    randomize(model)
    return model
