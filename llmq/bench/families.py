"""Every decoder that transformers knows, tiny and random: quantized, loaded packed, and compared with its dequantized weights.

The configs are transformers' defaults with sizes made small, whatever a type calls them. A type whose default config cannot be
shrunk like that is left out of the table and counted.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmq.api import quantize
from llmq.blocks.experts import split
from llmq.blocks.stacks import find_stacks
from llmq.config import QuantConfig
from llmq.errors import LlmqError
from llmq.hf.quantizer import load
from llmq.hf.source import open_source
from llmq.report import Report
from llmq.serving.linear import QuantLinear

MOST_PARAMETERS = 5_000_000
TOLERANCE = 1e-3
WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "lru_width", "word_embed_proj_dim", "mlp_hidden_size")
INNER = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "hidden_dim",
    "block_ff_dim",
    "dim_ff",
    "mamba_d_ssm",
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k")
OTHER = {
    "vocab_size": 128,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "dim_head": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "zero_expert_num": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "state_size": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "sliding_window": 8,
    "rotary_dim": 8,
}
SIZES = (
    dict.fromkeys(WIDTH, 64)
    | dict.fromkeys(INNER, 128)
    | dict.fromkeys(LAYERS, 2)
    | dict.fromkeys(HEADS, 4)
    | dict.fromkeys(EXPERTS, 4)
    | dict.fromkeys(CHOSEN, 2)
    | OTHER
)


@dataclass(frozen=True)
class Family:
    """What became of one model type.

    Fields:
        name: the model type.
        kind: `text`, `MoE`, `hybrid` or both of the last two.
        share: of the parameters of its decoder blocks, that are quantized; None where the model was refused.
        stays: names of what holds the other matrices of the blocks.
        difference: of the packed model's logits from the dequantized model's, relative; None where refused.
        note: why it was refused, or what the report says.
    """

    name: str
    kind: str
    share: float | None
    stays: tuple[str, ...]
    difference: float | None
    note: str


def model_types() -> tuple[str, ...]:
    """Every type with a causal language model in this version of transformers."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The type's default config with small sizes. Raises whatever a config does that takes no such sizes."""
    make = CONFIG_MAPPING[model_type]
    default = make()
    known = set(getattr(default, "attribute_map", {})) | set(vars(default))
    sizes: dict[str, Any] = {key: value for key, value in SIZES.items() if key in known}
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = 4
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and "layer_types" in vars(default):
        sizes["layer_types"] = (kinds * 2)[:2]
    return make(**sizes)


def tiny_model(model_type: str) -> PreTrainedModel | None:
    """A random model in float32 with every parameter drawn; None where it cannot be built small."""
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            small = AutoModelForCausalLM.from_config(config)
        if sum(p.numel() for p in small.parameters()) > MOST_PARAMETERS:
            return None
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception:  # configs and models raise anything on sizes that they do not take
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as some types make it whenever they are loaded
    return model


def measure(model_type: str, method: str = "rtn") -> Family | None:
    """Quantize a tiny model of the type and compare; None where it cannot be built small."""
    model = tiny_model(model_type)
    if model is None:
        return None
    kind = _kind(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _measured(model, model_type, kind, method, Path(folder))
        except LlmqError as error:
            return Family(model_type, kind, None, (), None, str(error).replace(folder, "").strip("/: "))
        except Exception as error:  # the table shows it
            return Family(model_type, kind, 0.0, (), math.inf, f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _measured(model: PreTrainedModel, model_type: str, kind: str, method: str, folder: Path) -> Family:
    config = QuantConfig(method, group_size=32, dtype="float32")
    ids = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "source")
    report = quantize(folder / "source", folder / "out", config, None if method == "rtn" else ids)
    packed = load(folder / "out")
    share, stays = _what_stays(model, report)
    return Family(model_type, kind, share, stays, _difference(model, packed, ids[:2]), _note(report))


def _kind(model: PreTrainedModel) -> str:
    kinds = []
    if _has_stacks(model):
        kinds.append("MoE")
    if any(isinstance(m, nn.Conv1d) for m in model.modules()) or any(
        "A_log" in name for name, _ in model.named_parameters()
    ):
        kinds.append("hybrid")
    return " ".join(kinds) or "text"


def _has_stacks(model: PreTrainedModel) -> bool:
    try:
        return bool(find_stacks(model))
    except LlmqError:
        return True


def _what_stays(model: PreTrainedModel, report: Report) -> tuple[float, tuple[str, ...]]:
    """The quantized share of the parameters of the blocks, and what holds the other matrices there."""
    blocks = model.get_submodule(open_source(model).blocks_name)
    total = sum(p.numel() for _, p in blocks.named_parameters())
    quantized = sum(row.shape[0] * row.shape[1] for row in report.layers)
    names = {row.name for row in report.layers}
    inside = {name.rpartition(".")[0] for name in names}
    mine = {id(parameter) for parameter in blocks.parameters()}
    stays = []
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.ndim < 2 or id(parameter) not in mine or owner in names:
            continue
        if not any(each.startswith(f"{owner}.") for each in inside):  # fused experts
            stays.append(".".join(part for part in name.split(".")[-3:-1] if not part.isdigit()))
    return quantized / total, tuple(dict.fromkeys(stays))


def _note(report: Report) -> str:
    return next((note for note in report.notes if "experts of a layer" in note), "").partition(":")[0]


@torch.no_grad()
def _difference(model: PreTrainedModel, packed: Any, ids: torch.Tensor) -> float:
    """The relative difference of the packed model's logits from those of `model`, which gets the dequantized weights."""
    split(model, open_source(model).experts.stacks)
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            original, dense = model.get_submodule(name), module.dequantize()
            assert isinstance(original.weight, torch.Tensor)
            original.weight.data.copy_(dense if isinstance(original, nn.Linear) else dense.T)
    want, found = (each(input_ids=ids, use_cache=False).logits.double() for each in (model, packed))
    return float((found - want).norm() / want.norm())
