"""Language models inside wrappers: only the text decoder is quantized, and the rest stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llmq
from llmq.evaluation import evaluate, generate_text
from llmq.hf.text_decoder import text_decoder
from llmq.serving.linear import QuantLinear
from tests.fixtures import tiny_tokenizer
from tests.tiny import HIDDEN
from tests.wrappers import LAYERS, WRAPPERS, tiny_wrapper

IDS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(2))
RTN = llmq.QuantConfig("rtn", group_size=32, dtype="float32")


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_wrapper_is_quantized_and_computes_as_dequantized(tmp_path: Path, model_type: str) -> None:
    model = tiny_wrapper(model_type)
    model.save_pretrained(tmp_path / "source")
    report = llmq.quantize(tmp_path / "source", tmp_path / "out", RTN)
    llmq.quantize(model, tmp_path / "held", RTN)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    held = load_file(tmp_path / "held" / "model.safetensors")
    assert stored.keys() == held.keys()
    assert all(torch.equal(stored[key], held[key]) for key in stored)
    loaded = llmq.load(tmp_path / "out")
    assert type(loaded) is type(model)
    decoder = text_decoder(model.config, model)
    packed = [name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)]
    assert packed == [row.name for row in report.layers] or set(packed) == {row.name for row in report.layers}
    assert all(name.startswith(f"{decoder.name}.layers.") for name in packed)
    assert {name.removeprefix(f"{decoder.name}.layers.").split(".")[0] for name in packed} == set(
        map(str, range(LAYERS))
    )
    kept = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert name.rpartition(".")[0] in packed or torch.equal(kept[name], parameter), name
    for name in packed:
        model.get_submodule(name).weight.data = loaded.get_submodule(name).dequantize()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "gemma3"])
def test_methods_with_data_evaluation_and_generation_work(tmp_path: Path, model_type: str) -> None:
    tiny_wrapper(model_type).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    report = llmq.quantize(tmp_path / "source", tmp_path / "out", llmq.QuantConfig(group_size=32), WINDOWS)
    assert all(row.error < row.rtn_error for row in report.layers)
    (tmp_path / "text.txt").write_text("w5 w6 w7 w8 w9 " * 40)
    (row,) = evaluate([("out", tmp_path / "out")], dataset=str(tmp_path / "text.txt"), window=32)
    assert row.results
    assert generate_text(tmp_path / "out", "w5 w6", max_new_tokens=3, stream=False).new_tokens >= 1


@pytest.mark.parametrize("model_type", ["llava", "gemma3", "qwen2_audio"])
def test_the_text_decoder_of_a_wrapper_runs_on_token_ids(model_type: str) -> None:
    model = tiny_wrapper(model_type)
    decoder = text_decoder(model.config, model)
    assert decoder.config is model.config.get_text_config(decoder=True)
    with torch.no_grad():
        assert decoder.module(input_ids=IDS, use_cache=False).last_hidden_state.shape == (*IDS.shape, HIDDEN)


def test_linears_outside_are_ignored_under_both_names(tmp_path: Path) -> None:
    tiny_wrapper("gemma3").save_pretrained(tmp_path / "source")
    llmq.quantize(tmp_path / "source", tmp_path / "out", RTN)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    tower = [name for name in ignored if "vision_tower" in name]
    assert {name.removeprefix("model.") for name in tower if name.startswith("model.")} == {
        name for name in tower if not name.startswith("model.")
    }
