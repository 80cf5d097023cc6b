"""`enable` and `disable`: plain `from_pretrained` loads what llmq can run, and leaves the rest to transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

import llmq
from llmq.hf import quantizer
from llmq.serving.linear import QuantLinear
from tests.fixtures import float32_checkpoint, logits, tiny_tokenizer
from tests.tiny import tiny_config, tiny_model


def test_enable_makes_plain_from_pretrained_packed_and_disable_undoes_it(tmp_path: Path) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    expected = logits(llmq.load(folder))
    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    llmq.enable()
    try:
        llmq.enable()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 28
        assert torch.equal(logits(model), expected)
        writer = pipeline("text-generation", model=str(folder), tokenizer=tiny_tokenizer())
        assert any(isinstance(m, QuantLinear) for m in writer.model.modules())
        assert len(writer("w5 w6 w7", max_new_tokens=3, do_sample=False)[0]["generated_text"].split()) > 3
    finally:
        llmq.disable()
    assert dict(AUTO_QUANTIZATION_CONFIG_MAPPING) == before
    llmq.disable()
    assert dict(AUTO_QUANTIZATION_CONFIG_MAPPING) == before
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert not any(isinstance(m, QuantLinear) for m in stock.modules())


def test_enable_wraps_and_disable_restores_a_replaced_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Another(AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]):  # type: ignore[misc]
        pass

    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", Another)
    llmq.enable()
    assert type(AutoQuantizationConfig.from_dict(scheme(num_bits=8, type="float"))) is Another
    llmq.disable()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is Another


def scheme(activations: bool = False, **weights: object) -> dict[str, object]:
    """A `quantization_config` of compressed-tensors, symmetric per channel, with changes to `weights`."""
    values = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": values}
    layout = "pack-quantized"
    if activations or values["type"] == "float":
        layout = "int-quantized" if values["type"] == "int" else "float-quantized"
        group["input_activations"] = {**values, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


UNSUPPORTED = {
    "fp8": scheme(num_bits=8, type="float"),
    "w8a8": scheme(True, num_bits=8),
    "nvfp4": {**scheme(), "format": "nvfp4-pack-quantized"},
    "tensor": scheme(strategy="tensor"),
    "g_idx": scheme(strategy="group", group_size=32, actorder="group"),
    "uncompressed": {**scheme(), "quantization_status": "frozen"},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_schemes_go_to_the_stock_quantizer(tmp_path: Path, name: str) -> None:
    stock = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    llmq.enable()
    try:
        assert isinstance(AutoQuantizationConfig.from_dict(scheme()), quantizer.PackedConfig)
        if name != "g_idx":  # compressed-tensors itself refuses to parse that one since 0.19
            made = AutoQuantizationConfig.from_dict(copy.deepcopy(UNSUPPORTED[name]))
            assert type(made) is stock
            assert made.quant_method == "compressed-tensors"
    finally:
        llmq.disable()
    tiny_config("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": UNSUPPORTED[name]}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(llmq.LlmqError, match=f"llmq cannot run {tmp_path}: "):
        llmq.load(tmp_path)


def test_a_w8a8_checkpoint_loads_the_same_while_enabled(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=2)
    state = model.state_dict()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            state[f"{name}.weight"] = (module.weight / scale).round().to(torch.int8)
            state[f"{name}.weight_scale"] = scale.detach()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.quantization_config = UNSUPPORTED["w8a8"]
    model.config.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    llmq.enable()
    try:
        enabled = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        llmq.disable()
    assert type(enabled.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert torch.equal(logits(plain), logits(enabled))
