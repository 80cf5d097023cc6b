"""GPT-2's linears, stored as [in, out]: quantized as linears, packed as [out, in], loaded packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.blocks.transposed import straightened, transposed_linears
from llmq.serving.linear import QuantLinear
from tests.tiny import randomize

IDS = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(1))


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    config = AutoConfig.for_model("gpt2", vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    randomize(model)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS[:2], use_cache=False).logits


def config(method: str, **own: Any) -> llmq.QuantConfig:
    return llmq.QuantConfig(method, group_size=32, dtype="float32", **own)


def test_a_straightened_model_computes_the_same_and_writes_through() -> None:
    model = gpt2(torch.float64)
    want, names = logits(model), set(transposed_linears(model))
    assert len(names) == 8
    with straightened(model):
        assert not transposed_linears(model)
        torch.testing.assert_close(logits(model), want, rtol=1e-12, atol=1e-12)
        model.get_submodule("transformer.h.0.attn.c_proj").weight.data.zero_()
    assert set(transposed_linears(model)) == names
    assert not model.transformer.h[0].attn.c_proj.weight.any()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq"])
@pytest.mark.parametrize("streamed", [True, False])
def test_quantized_and_loaded_packed(method: str, streamed: bool, tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "source")
    source = tmp_path / "source" if streamed else model
    report = llmq.quantize(source, tmp_path / "out", config(method), None if method == "rtn" else IDS)
    assert any("stores as [in, out]" in note for note in report.notes)
    assert llmq.preview(source, config(method)).after == report.checkpoint_bytes
    packed = llmq.load(tmp_path / "out")
    linears = {name: m for name, m in packed.named_modules() if isinstance(m, QuantLinear)}
    assert len(linears) == 8
    lost = float((logits(packed) - logits(model)).norm() / logits(model).norm())
    assert lost < 0.25
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    if method != "awq+gptq":  # which scales norms and biases
        assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items() if name in stored)
        for name, linear in linears.items():
            model.get_submodule(name).weight.data.copy_(linear.dequantize().T)
        torch.testing.assert_close(logits(packed), logits(model), rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


def test_those_that_are_ignored_stay_as_they_are(tmp_path: Path) -> None:
    model = gpt2()
    llmq.quantize(model, tmp_path / "out", config("rtn", ignore=("re:.*c_fc",)))
    packed = llmq.load(tmp_path / "out")
    assert len(transposed_linears(packed)) == 2
    assert torch.equal(packed.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
