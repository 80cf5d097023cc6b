"""Models whose blocks hold more than linears and norms, or pass state to later blocks besides their outputs."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq import QuantConfig
from llmq.serving.linear import QuantLinear
from tests.tiny import HIDDEN, VOCAB, randomize

IDS = torch.randint(3, VOCAB, (16, 32), generator=torch.Generator().manual_seed(1))
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention"] * 2
DELTA = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128},
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128, "mamba_n_groups": 1, "head_dim": 16},
    "granitemoehybrid": MAMBA
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 128},
    "gemma3n_text": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
        "laurel_rank": 8,
        "layer_types": MIXED,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "sliding_window": 8,
    },
    "xglm": {"d_model": HIDDEN, "attention_heads": 4, "num_layers": 2, "ffn_dim": 128},
}
RARE = ("falcon_h1", "olmo_hybrid", "granitemoehybrid", "xglm")


@pytest.mark.parametrize("method", ["rtn", "gptq", pytest.param("awq", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", [pytest.param(a, marks=pytest.mark.slow if a in RARE else ()) for a in FAMILIES])
def test_the_packed_model_computes_what_the_dequantized_one_does(tmp_path, arch, method):
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **COMMON | FAMILIES[arch])).float().eval()
    randomize(dense)
    dense.save_pretrained(tmp_path / "dense")
    llmq.quantize(tmp_path / "dense", tmp_path / "packed", QuantConfig(method, 4, 32, dtype="float32"), IDS)
    packed = llmq.load(tmp_path / "packed", dtype=torch.float32, device_map="cpu").eval()
    before, after = dense.state_dict(), packed.state_dict()
    for name, linear in packed.named_modules():
        if isinstance(linear, QuantLinear):
            dense.get_submodule(name).weight.data = linear.dequantize()
    if method != "awq":  # which changes norms and rows
        assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)
        with torch.no_grad():
            want, found = (m(IDS[:2], use_cache=False).logits for m in (dense, packed))
        assert torch.allclose(found, want, atol=1e-4)
