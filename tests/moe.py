"""Tiny random mixtures of experts, for the tests: four experts a layer, two of them for each token where the type allows it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import randomize

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0}
_FULL = {"layer_types": ["full_attention", "full_attention"]}

SPLIT: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": _FOUR | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": _FOUR | {"moe_intermediate_size": 32},
    "olmoe": _FOUR,
    "deepseek_v2": _ROUTED | _LATENT | {"head_dim": None},
    "deepseek_v3": _ROUTED | _LATENT | {"head_dim": None},
    "glm4_moe": _ROUTED,
    "ernie4_5_moe": _ERNIE | {"moe_layer_end_index": 1, "moe_num_shared_experts": 1},
    "minimax_m2": _LOCAL,
    "phimoe": _LOCAL,
    "dots1": _ROUTED,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "flex_olmo": _FOUR,
}
"""Types whose files hold one entry for each expert, and what their configs need beside the common values."""

FUSED: dict[str, dict[str, Any]] = {
    "gpt_oss": _LOCAL | _FULL,
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 1,
    },
    "granitemoe": _LOCAL,
    "jetmoe": _LOCAL | {"kv_channels": 16},
}
"""Types whose files hold the experts of a layer as one tensor."""


def moe_model(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32, **own: Any) -> PreTrainedModel:
    """A random causal LM of one of these types, in eval mode; its experts run one after the other, in any dtype."""
    config = AutoConfig.for_model(arch, **_COMMON | (SPLIT | FUSED)[arch] | own)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    randomize(model, seed)
    return model
