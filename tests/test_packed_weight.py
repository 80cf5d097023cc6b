"""What code for dense linears does with a packed one: reads its weight, attaches adapters, writes to its tensors, traces it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.core.grid import Grid
from llmq.serving.fused import fuse_linears
from tests.fixtures import IDS, K, N, checkpoint, float32_checkpoint, logits, quantized_weight, rows
from tests.tiny import randomize


def linear(dtype: torch.dtype = torch.bfloat16) -> llmq.QuantLinear:
    return llmq.QuantLinear.from_quantized(quantized_weight(Grid(4, 32, True), dtype))


def assign(scale: Tensor) -> None:
    scale.data = scale * 2


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "copy_": lambda scale: scale.copy_(scale * 2),
    "data.copy_": lambda scale: scale.data.copy_(scale * 2),
    "data =": assign,
    "data kept": lambda scale: scale.data.mul_(2),
}


@pytest.mark.parametrize("write", WRITES)
def test_layouts_notice_writes_to_stored_tensors(write: str) -> None:
    module, x = linear(), rows(1)
    with torch.no_grad():
        before = module(x)
        WRITES[write](module.weight_scale)
        torch.testing.assert_close(module(x), 2 * before)
        WRITES[write](module.weight_scale)
        torch.testing.assert_close(module(x), 4 * before)


def test_the_weight_reads_as_a_dense_one_and_holds_nothing() -> None:
    module = linear()
    weight, dense = module.weight, module.dequantize()
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, dense.dtype, dense.device)
    for read in (lambda w: w + 0, lambda w: w.data, lambda w: w.T.T, lambda w: w[:], lambda w: w.clone()):
        assert torch.equal(read(weight), dense)
    assert torch.equal(nn.functional.linear(rows(2), weight), nn.functional.linear(rows(2), dense))
    assert "weight" not in module.state_dict()
    assert module.half().weight.dtype == torch.float16
    with pytest.raises(llmq.LlmqError, match="cannot be written in place.*assign a dense tensor to linear.weight"):
        module.weight.mul_(2)


@pytest.mark.parametrize("fused", [False, True])
def test_assigning_a_weight_makes_the_linear_dense(tmp_path: Path, fused: bool) -> None:
    model = llmq.load(float32_checkpoint(tmp_path / "a", "qwen2", method="rtn"), fuse=fused)
    expected = logits(model)
    for attention in (layer.self_attn for layer in model.model.layers):
        attention.q_proj.weight.data = attention.q_proj.dequantize()
        attention.k_proj.weight = nn.Parameter(attention.k_proj.dequantize())
        assert type(attention.q_proj) is type(attention.k_proj) is nn.Linear
        assert set(attention.q_proj.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(llmq.LlmqError, match=r"must be \[48, 96\]; got \[1, 1\]"):
        linear().weight = torch.ones(1, 1)
    assert fuse_linears(model)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_adapters_attach_train_and_merge(tmp_path: Path, targets: Any, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    loaded = llmq.load(checkpoint(tmp_path / "a"), dtype=torch.float32)  # scales in bfloat16
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets, **options)
    model = peft.get_peft_model(loaded, config)
    model(IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(merged.model.layers[0].self_attn.o_proj, llmq.QuantLinear) == (targets != "all-linear")


OWN = {"gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128}, "nanochat": {}}


@pytest.mark.parametrize("arch", OWN)
def test_models_whose_initialization_reads_weights_load(tmp_path: Path, arch: str) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    source = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(arch, **{**sizes, **heads, **ids, **OWN[arch]}), dtype=torch.float32
    ).eval()
    randomize(source)
    llmq.quantize(source, tmp_path / "q", llmq.QuantConfig("rtn", bits=8, group_size=32, dtype="float32"))
    model = llmq.load(tmp_path / "q")
    for name, module in model.named_modules():
        if isinstance(module, llmq.QuantLinear):
            source.get_submodule(name).weight.data = module.dequantize()
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_number_of_rows(strict: bool) -> None:
    module = linear()
    program = export(module, (rows(1, 4),), dynamic_shapes=({1: Dim("s", min=2, max=512)},), strict=strict)
    for count in (3, 100):
        x = rows(1, count)
        torch.testing.assert_close(program.module()(x), module(x), rtol=2e-2, atol=0.2)


def test_functional_transforms_of_a_linear() -> None:
    module = linear(torch.float32)
    x = rows(3, dtype=torch.float32)
    dense = module.dequantize()
    torch.testing.assert_close(torch.func.vmap(module)(x), module(x), rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda v: module(v).sum())(x)
    torch.testing.assert_close(gradient, dense.sum(0).expand(3, K), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.jacrev(module)(x[0]), dense, rtol=1e-4, atol=1e-4)
    doubled = {**dict(module.named_parameters()), "weight_scale": module.weight_scale * 2}
    torch.testing.assert_close(torch.func.functional_call(module, doubled, (x,)), 2 * module(x), rtol=1e-4, atol=1e-4)
    assert dense.shape == (N, K)
