"""Models of known shapes with random weights, made on the device: to measure speed without network or disk.

Speed depends neither on the weights' values nor on the base of rotary positions, which keeps transformers' default. Weights
are drawn as transformers draws those of a new model, directly in the requested dtype: there is one copy in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.errors import LlmqError

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}


def random_model(shape: str, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """A llama of one of `SHAPES` in eval mode. The global generators are not changed. Raises `LlmqError` for an unknown shape."""
    if shape not in SHAPES:
        raise LlmqError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    config = AutoConfig.for_model("llama", **SHAPES[shape], tie_word_embeddings=False)
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
