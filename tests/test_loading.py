"""What stock transformers loads still loads after `enable`, and `load` takes what `from_pretrained` takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CompressedTensorsConfig,
)

import llmq
from llmq.core.packing import pack
from tests.fixtures import IDS, checkpoint, float32_checkpoint, logits
from tests.tiny import randomize

pytest.importorskip("compressed_tensors")


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    llmq.enable()
    yield
    llmq.disable()


def packed_count(model: torch.nn.Module) -> int:
    return sum(isinstance(module, llmq.QuantLinear) for module in model.modules())


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def packed_moe(folder: Path) -> Path:
    """Experts stored one by one and packed, which transformers holds as one parameter."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = AutoConfig.for_model("qwen3_moe", **sizes, **heads, **moe)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            stored[name] = weight
            continue
        groups = weight.reshape(len(weight), -1, 32)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.uint8).reshape(weight.shape)
        shape = torch.tensor(weight.shape)
        stored |= {f"{name}_packed": pack(codes, 4), f"{name}_scale": scale.squeeze(-1), f"{name}_shape": shape}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_packed_experts_load_packed(tmp_path: Path) -> None:
    """Made by other tools: every expert under a name of its own."""
    folder = packed_moe(tmp_path / "moe")
    ours = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert any(".experts." in name and isinstance(module, llmq.QuantLinear) for name, module in ours.named_modules())
    assert torch.equal(logits(ours), logits(llmq.load(folder)))
    llmq.disable()
    stock = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-4)


def test_what_the_caller_asks_for_is_done(tmp_path: Path) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    dense = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert packed_count(dense) == 0
    torch.testing.assert_close(logits(dense), logits(llmq.load(folder)), rtol=1e-3, atol=1e-3)
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig())
    assert packed_count(packed) == 28


@pytest.mark.parametrize("size", [None, "50kB"])
def test_variants(tmp_path: Path, size: str | None) -> None:
    model = llmq.load(float32_checkpoint(tmp_path / "a", method="rtn"))
    model.save_pretrained(tmp_path / "v", variant="w4", **({"max_shard_size": size} if size else {}))
    for load in (llmq.load, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path / "v", variant="w4")), logits(model))
    with pytest.raises(llmq.LlmqError, match=r"has neither model\.safetensors"):
        llmq.load(tmp_path / "v")


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dense sparsity": lambda c: c.update(sparsity_config={"format": "dense", "global_sparsity": 0.1}),
    "no strategy": lambda c: c["config_groups"]["group_0"]["weights"].pop("strategy"),
    "names in memory": lambda c: c.update(ignore=["lm_head", "model.nothing"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_entries_that_change_nothing(tmp_path: Path, change: str) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    change_config(folder, CHANGES[change])
    assert packed_count(llmq.load(folder)) == packed_count(AutoModelForCausalLM.from_pretrained(folder)) == 28


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_new_head_is_dense_and_survives_saving(tmp_path: Path, kind: Any) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    model = kind.from_pretrained(folder, num_labels=3)
    assert packed_count(model) == packed_count(AutoModel.from_pretrained(folder)) == 28
    model.save_pretrained(tmp_path / "b")
    again = kind.from_pretrained(tmp_path / "b")
    assert torch.equal(again(IDS[:1]).logits, model(IDS[:1]).logits)


GIVEN = [{"use_cache": False}, {"max_position_embeddings": 512}, {"output_hidden_states": True}]


@pytest.mark.parametrize("given", [*GIVEN, {"num_hidden_layers": 2}, {"attn_implementation": "eager"}], ids=str)
def test_load_takes_the_arguments_of_from_pretrained(tmp_path: Path, given: dict[str, Any]) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    ours, enabled = llmq.load(folder, **given), AutoModelForCausalLM.from_pretrained(folder, **given)
    for name, value in given.items():
        name = "_attn_implementation" if name == "attn_implementation" else name
        assert getattr(ours.config, name) == getattr(enabled.config, name) == value
    assert torch.equal(logits(ours), logits(enabled))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_dequantize(tmp_path: Path, fuse: bool, dtype: torch.dtype | None) -> None:
    model = llmq.load(checkpoint(tmp_path / "a", "qwen2"), dtype=torch.float32, fuse=fuse)
    expected = logits(model)
    dense = model.dequantize(dtype) if dtype else model.dequantize()
    assert packed_count(dense) == 0
    assert dense.dtype == (dtype or torch.float32)
    torch.testing.assert_close(logits(dense).float(), expected, rtol=1e-3, atol=1e-3)
    dense.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")).float(), expected, rtol=1e-3, atol=1e-3
    )


def test_a_model_with_one_dense_linear_is_saved_with_it(tmp_path: Path) -> None:
    model = llmq.load(float32_checkpoint(tmp_path / "a", method="rtn"))
    linear = model.model.layers[0].mlp.up_proj
    linear.weight.data = linear.dequantize() * 2
    model.save_pretrained(tmp_path / "b")
    again = llmq.load(tmp_path / "b")
    assert packed_count(again) == 27
    assert torch.equal(logits(again), logits(model))
