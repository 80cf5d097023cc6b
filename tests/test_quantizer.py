"""`load`: whole models that stay packed, on every architecture, against the dequantized model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmq
from llmq.hf import quantizer
from llmq.serving.linear import QuantLinear
from tests.fixtures import DISK, IDS, WINDOWS, float32_checkpoint, logits
from tests.tiny import ARCHITECTURES, randomize, tiny_config, tiny_model


def dense_copy(model: PreTrainedModel, arch: str) -> PreTrainedModel:
    """The plain model that holds the dequantized weights of `model`."""
    dense = tiny_model(arch)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            dense.get_submodule(name).weight.data = module.dequantize()
    return dense


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loaded_logits_equal_those_of_the_dequantized_model(tmp_path: Path, arch: str, symmetric: bool) -> None:
    original = tiny_model(arch)
    before = copy.deepcopy(original.state_dict())
    config = llmq.QuantConfig("gptq", group_size=32, symmetric=symmetric, dtype="float32")
    report = llmq.quantize(original, tmp_path / "out", config, WINDOWS)
    assert all(torch.equal(before[k], v) for k, v in original.state_dict().items()), "the source is not changed"
    model = llmq.load(tmp_path / "out")
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(report.layers)
    assert all(row.error < row.rtn_error for row in report.layers), "gptq beats rtn on every linear"
    torch.testing.assert_close(logits(model), logits(dense_copy(model, arch)), rtol=1e-4, atol=1e-4)


def test_saving_and_loading_again_is_exact(tmp_path: Path) -> None:
    model = llmq.load(float32_checkpoint(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b", max_shard_size="50kB")
    again = llmq.load(tmp_path / "b")
    assert list(model.state_dict()) == list(again.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    stored = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_stock_stack_computes_the_same(tmp_path: Path, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    folder = float32_checkpoint(tmp_path / "a", symmetric=symmetric)
    ours = llmq.load(folder)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-3, atol=1e-3)
    chosen = [m.generate(IDS[:1], max_new_tokens=12, do_sample=False) for m in (ours, stock)]
    assert torch.equal(*chosen)


def test_generate_with_a_static_cache(tmp_path: Path) -> None:
    model = llmq.load(float32_checkpoint(tmp_path / "a"))
    plain = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    static = model.generate(
        IDS[:1], max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(plain, static)


def test_gradients_reach_the_input(tmp_path: Path) -> None:
    linear = next(m for m in llmq.load(float32_checkpoint(tmp_path / "a")).modules() if isinstance(m, QuantLinear))
    x = torch.randn(3, linear.in_features, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.dequantize().sum(0).expand(3, -1))


def test_casting_the_model_does_not_cast_scales(tmp_path: Path) -> None:
    model = llmq.load(float32_checkpoint(tmp_path / "a")).to(torch.bfloat16)
    linear = next(m for m in model.modules() if isinstance(m, QuantLinear))
    assert linear.weight_scale.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_explain_names_the_kernel_and_the_reasons(tmp_path: Path) -> None:
    rows = llmq.explain(llmq.load(float32_checkpoint(tmp_path / "a", method="rtn", dtype="bfloat16")))
    assert len(rows) == 28
    assert (rows[0].few_rows, rows[0].many_rows) == ("cpu_int4", "slab")
    assert "512 rows: cpu_int4 runs at most" in str(rows[0])
    assert "1 row: slab comes after cpu_int4" in str(rows[0])
    exact = llmq.explain(llmq.load(float32_checkpoint(tmp_path / "b", method="rtn")))
    assert (exact[0].few_rows, exact[0].many_rows) == ("slab", "slab")
    assert "cpu_int4 requires bfloat16 input; got float32" in str(exact[0])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_in_bfloat16_all_kernels_give_the_same_model(tmp_path: Path, bits: int, symmetric: bool) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn", dtype="bfloat16", bits=bits, symmetric=symmetric)
    exact = logits(llmq.load(folder, dtype=torch.float32))
    for kernel in (None, "slab", "cpu_int4"):
        got = logits(llmq.load(folder, kernel=kernel)).float()
        assert (got - exact).pow(2).mean().sqrt() < 0.03 * exact.pow(2).mean().sqrt()


def test_the_checkpoints_dtype_is_the_default_and_scales_keep_theirs(tmp_path: Path) -> None:
    folder = float32_checkpoint(tmp_path / "a", "qwen2", method="rtn", dtype="bfloat16")
    assert llmq.load(folder).dtype == torch.bfloat16
    model = llmq.load(folder, dtype=torch.float16)
    linear = model.model.layers[0].self_attn.q_proj
    assert (linear.weight_scale.dtype, linear.bias.dtype) == (torch.bfloat16, torch.float16)
    assert model.model.embed_tokens.weight.dtype == torch.float16
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = tiny_config("llama", layers=2)
    config.tie_word_embeddings = True
    source = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(source)
    llmq.quantize(source, tmp_path / "a", llmq.QuantConfig(method="rtn", group_size=32, dtype="float32"))
    model = llmq.load(tmp_path / "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            source.get_submodule(name).weight.data = module.dequantize()
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "b")
    assert "lm_head.weight" not in load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(logits(llmq.load(tmp_path / "b")), logits(model))


def test_device_maps_and_offloaded_weights(tmp_path: Path) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn", dtype="bfloat16")
    assert torch.equal(logits(llmq.load(folder, device_map="auto")), logits(llmq.load(folder)))
    layers = {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    split = {"device_map": {**DISK, **layers}, "offload_folder": tmp_path / "offload"}
    assert torch.equal(logits(llmq.load(folder, "slab", **split)), logits(llmq.load(folder, "slab")))
    model = llmq.load(folder, **split)
    away, here = (model.model.layers[i].mlp.up_proj for i in (3, 0))
    assert away.weight_packed.is_meta
    assert not here.weight_packed.is_meta
    got, want = logits(model).float(), logits(llmq.load(folder, dtype=torch.float32))
    assert (got - want).pow(2).mean().sqrt() < 0.03 * want.pow(2).mean().sqrt()
    assert away._layouts == {}
    assert here._layouts != {}
    assert "the weight is offloaded" in str(llmq.explain(model)[-1])


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "falcon"])
def test_a_model_compiles_into_one_graph(tmp_path: Path, arch: str) -> None:
    torch._dynamo.reset()
    model = llmq.load(float32_checkpoint(tmp_path / "a", arch, method="rtn", dtype="bfloat16"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :1]):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=2e-2, atol=2e-2)


def test_gradients_pass_through_a_model(tmp_path: Path) -> None:
    model = llmq.load(float32_checkpoint(tmp_path / "a", method="rtn"))
    dense = dense_copy(model, "llama")
    gradients = []
    for each in (model, dense):
        embeddings = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=embeddings).logits.float().pow(2).mean().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_config_of_a_loaded_model_can_be_passed_to_another_load(tmp_path: Path) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    model, info = llmq.load(folder, output_loading_info=True)
    assert not info["missing_keys"]
    for again in (
        llmq.load(folder, config=model.config),
        AutoModelForCausalLM.from_pretrained(folder, config=model.config),
    ):
        assert torch.equal(logits(again), logits(model))
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert model.config.to_dict()["quantization_config"] == stored
    with pytest.raises(llmq.LlmqError, match="load takes no quantization_config"):
        llmq.load(folder, quantization_config={})


def test_dense_and_absent_models_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    assert quantizer.quantization_config_of(tmp_path / "plain") is None
    with pytest.raises(llmq.LlmqError, match="is not quantized"):
        llmq.load(tmp_path / "plain")
    with pytest.raises(llmq.LlmqError, match="is not a model folder or repo"):
        llmq.load(tmp_path / "absent")
