"""Tiny random models of every architecture that the library is tested on, built from configs: no network, milliseconds.

Fresh models have zero biases and identity norms, so that a test on them cannot fail where a bias is lost or a fold is
wrong: here every parameter is drawn. Matrices keep the variance of their input (attention and logits are not flat).
Widths are multiples of 32, so that groups of 32 and 64 fit; mixed architectures have both layer types, twice each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmq.blocks.capture import Call, capture, find_blocks
from llmq.blocks.topology import input_groups

VOCAB = 128
HIDDEN = 64
INTERMEDIATE = 128
POSITIONS = 128
WINDOW = 8

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "cohere",
    "starcoder2",
    "stablelm",
    "opt",
    "gpt_neox",
    "bloom",
    "falcon",
)


def tiny_config(arch: str, layers: int = 4) -> PreTrainedConfig:
    """The config of `tiny_model`: hidden 64, intermediate 128, 4 heads of 16, 128 words, 128 positions."""
    mixed = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    modern = {
        "intermediate_size": INTERMEDIATE,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
    }
    own: dict[str, dict[str, Any]] = {
        "llama": modern,
        "mistral": modern | {"sliding_window": WINDOW},
        "qwen2": modern | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": mixed},
        "qwen3": modern | {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": mixed},
        "gemma2": modern
        | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "layer_types": mixed},
        "gemma3_text": modern
        | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "layer_types": mixed},
        "phi3": modern | {"original_max_position_embeddings": POSITIONS},
        "olmo2": modern,
        "granite": modern
        | {
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        "smollm3": modern
        | {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": mixed,
            "no_rope_layers": [int(kind == "sliding_attention") for kind in mixed],
        },
        "cohere": modern,
        "starcoder2": modern,
        "stablelm": modern | {"use_qkv_bias": True},
        "opt": {"ffn_dim": INTERMEDIATE, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": HIDDEN},
        "gpt_neox": {"intermediate_size": INTERMEDIATE, "max_position_embeddings": POSITIONS},
        "bloom": {},
        "falcon": {"ffn_hidden_size": INTERMEDIATE, "max_position_embeddings": POSITIONS, "bias": True},
    }
    return AutoConfig.for_model(arch, **common, **own[arch])


def tiny_model(arch: str, seed: int = 0, layers: int = 4) -> PreTrainedModel:
    """A random causal LM of architecture `arch` (one of `ARCHITECTURES`) in float32, in eval mode.

    The same arguments give the same parameters, whatever the state of the global generator.
    """
    model = AutoModelForCausalLM.from_config(tiny_config(arch, layers), dtype=torch.float32).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter in place: vectors around what they were, matrices with variance 1 / inputs."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(noise, alpha=0.2)
        elif id(parameter) in embeddings:
            parameter.copy_(noise * 0.5)
        else:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))


def taken_apart(
    arch: str, index: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, Call, torch.Tensor, list[tuple[str, ...]]]:
    """A block of `tiny_model(arch)`, how the model calls it on 16 tokens, its input, and its linears by shared input."""
    model = tiny_model(arch).to(dtype)
    _, blocks = find_blocks(model)
    ids = torch.randint(3, VOCAB, (1, 16), generator=torch.Generator().manual_seed(1))
    captured = capture(model, lambda batch: model.base_model(input_ids=batch, use_cache=False), [ids])
    call, hidden = captured.calls[index][0], captured.hidden[0]
    return blocks[index], call, hidden, list(input_groups(blocks[index], call, hidden))
