"""Quantize, save, load, run: the whole journey on every architecture, and what serving must refuse."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

import llmq
from llmq.hf import quantizer
from llmq.serving.linear import QuantLinear
from tests.fixtures import DISK, IDS, WINDOWS, logits, tiny_tokenizer
from tests.tiny import ARCHITECTURES, VOCAB, randomize, tiny_config, tiny_model


def quantized(folder: Path, arch: str = "llama", **changes: object) -> Path:
    config = llmq.QuantConfig(**{"group_size": 32, "dtype": "float32", **changes})  # type: ignore[arg-type]
    llmq.quantize(tiny_model(arch), folder, config, WINDOWS)
    return folder


def dense_twin(model: PreTrainedModel, arch: str) -> PreTrainedModel:
    """The plain model that holds the dequantized weights of `model`."""
    twin = tiny_model(arch)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            twin.get_submodule(name).weight.data = module.dequantize()
    return twin


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
    torch.testing.assert_close(logits(model), logits(dense_twin(model, arch)), rtol=1e-4, atol=1e-4)


def test_saving_and_loading_again_is_exact(tmp_path: Path) -> None:
    model = llmq.load(quantized(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b", max_shard_size="50kB")
    again = llmq.load(tmp_path / "b")
    assert list(model.state_dict()) == list(again.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    stored = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(model), logits(again))


def test_linears_of_one_input_share_its_seconds(tmp_path: Path) -> None:
    report = llmq.quantize(tiny_model("llama"), tmp_path / "a", llmq.QuantConfig(group_size=32), WINDOWS)
    q, k, v = report.layers[:3]
    assert q.seconds == k.seconds == v.seconds > 0
    assert sum(row.seconds for row in report.layers) <= report.seconds


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    files = [(quantized(tmp_path / name) / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_enable_makes_plain_from_pretrained_packed_and_disable_undoes_it(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "a", method="rtn")
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


def test_enable_stands_on_whatever_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
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


FOREIGN = {
    "fp8": scheme(num_bits=8, type="float"),
    "w8a8": scheme(True, num_bits=8),
    "nvfp4": {**scheme(), "format": "nvfp4-pack-quantized"},
    "tensor": scheme(strategy="tensor"),
    "g_idx": scheme(strategy="group", group_size=32, actorder="group"),
    "uncompressed": {**scheme(), "quantization_status": "frozen"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_schemes_that_are_not_ours_go_on_to_the_stock_quantizer(tmp_path: Path, name: str) -> None:
    stock = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    llmq.enable()
    try:
        assert type(AutoQuantizationConfig.from_dict(scheme())) is quantizer.PackedConfig
        if name != "g_idx":  # compressed-tensors itself refuses to parse that one since 0.19
            made = AutoQuantizationConfig.from_dict(copy.deepcopy(FOREIGN[name]))
            assert type(made) is stock
            assert made.quant_method == "compressed-tensors"
    finally:
        llmq.disable()
    tiny_config("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": FOREIGN[name]}))
    assert not quantizer.is_quantized(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(llmq.LlmqError, match="is not for llmq to run"):
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
    model.config.quantization_config = FOREIGN["w8a8"]
    model.config.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    llmq.enable()
    try:
        enabled = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        llmq.disable()
    assert type(enabled.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert torch.equal(logits(plain), logits(enabled))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_stock_stack_computes_the_same(tmp_path: Path, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    folder = quantized(tmp_path / "a", symmetric=symmetric)
    ours = llmq.load(folder)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-3, atol=1e-3)
    chosen = [m.generate(IDS[:1], max_new_tokens=12, do_sample=False) for m in (ours, stock)]
    assert torch.equal(*chosen)


def test_generate_with_a_static_cache(tmp_path: Path) -> None:
    model = llmq.load(quantized(tmp_path / "a"))
    plain = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    static = model.generate(
        IDS[:1], max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(plain, static)


def test_gradients_reach_the_input(tmp_path: Path) -> None:
    linear = next(m for m in llmq.load(quantized(tmp_path / "a")).modules() if isinstance(m, QuantLinear))
    x = torch.randn(3, linear.in_features, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.dequantize().sum(0).expand(3, -1))


def test_casting_the_model_leaves_the_scales_alone(tmp_path: Path) -> None:
    model = llmq.load(quantized(tmp_path / "a")).to(torch.bfloat16)
    linear = next(m for m in model.modules() if isinstance(m, QuantLinear))
    assert linear.weight_scale.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_layers_of_differing_group_size_get_groups_of_their_own(tmp_path: Path) -> None:
    report = llmq.quantize(
        tiny_model("llama"), tmp_path / "a", llmq.QuantConfig(group_size=128, dtype="float32"), WINDOWS
    )
    assert any("128 does not divide 64: groups of 64" in line for line in report.fallbacks)
    model = llmq.load(tmp_path / "a")
    assert {m.grid.group_size for m in model.modules() if isinstance(m, QuantLinear)} == {64, 128}


def test_explain_names_the_kernel_and_the_reasons(tmp_path: Path) -> None:
    rows = llmq.explain(llmq.load(quantized(tmp_path / "a", method="rtn", dtype="bfloat16")))
    assert len(rows) == 28
    assert (rows[0].few_rows, rows[0].many_rows) == ("cpu_int4", "slab")
    assert "512 rows: cpu_int4 runs at most" in str(rows[0])
    assert "1 row: slab comes after cpu_int4" in str(rows[0])
    exact = llmq.explain(llmq.load(quantized(tmp_path / "b", method="rtn")))
    assert (exact[0].few_rows, exact[0].many_rows) == ("slab", "slab")
    assert "cpu_int4 requires bfloat16 input; got float32" in str(exact[0])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_in_bfloat16_all_kernels_give_the_same_model(tmp_path: Path, bits: int, symmetric: bool) -> None:
    folder = quantized(tmp_path / "a", method="rtn", dtype="bfloat16", bits=bits, symmetric=symmetric)
    exact = logits(llmq.load(folder, dtype=torch.float32))
    for kernel in (None, "slab", "cpu_int4"):
        got = logits(llmq.load(folder, kernel=kernel)).float()
        assert (got - exact).pow(2).mean().sqrt() < 0.03 * exact.pow(2).mean().sqrt()


def test_the_checkpoints_own_dtype_is_the_default_and_scales_keep_theirs(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "a", "qwen2", method="rtn", dtype="bfloat16")
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


def test_device_maps_and_weights_left_on_disk(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "a", method="rtn", dtype="bfloat16")
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


def test_broken_weights_on_disk_are_found_too(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "a", method="rtn")
    rewrite(folder, SCALE, lambda t: t * float("nan"))
    layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    with pytest.raises(llmq.LlmqError, match="up_proj.weight_scale holds NaN"):
        llmq.load(folder, device_map={**DISK, **layers}, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "falcon"])
def test_a_whole_model_compiles_without_a_break(tmp_path: Path, arch: str) -> None:
    torch._dynamo.reset()
    model = llmq.load(quantized(tmp_path / "a", arch, method="rtn", dtype="bfloat16"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :1]):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=2e-2, atol=2e-2)


def test_gradients_pass_through_a_model(tmp_path: Path) -> None:
    model = llmq.load(quantized(tmp_path / "a", method="rtn"))
    twin = dense_twin(model, "llama")
    found = []
    for each in (model, twin):
        embeddings = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=embeddings).logits.float().pow(2).mean().backward()
        found.append(embeddings.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_a_loaded_models_config_serves_for_another_load(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "a", method="rtn")
    model, info = llmq.load(folder, output_loading_info=True)
    assert not info["missing_keys"]
    for again in (
        llmq.load(folder, config=model.config),
        AutoModelForCausalLM.from_pretrained(folder, config=model.config),
    ):
        assert torch.equal(logits(again), logits(model))
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert model.config.to_dict()["quantization_config"] == stored
    with pytest.raises(llmq.LlmqError, match="quantization_config cannot be given"):
        llmq.load(folder, quantization_config={})


PACKED = "model.layers.1.mlp.up_proj.weight_packed"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"
BIAS = "model.layers.1.self_attn.q_proj.bias"


def rewrite(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Change, add or (None) take out one tensor of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name] if name in tensors else torch.zeros(64, 64))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = [
    (PACKED, None, r"up_proj.weight_packed is missing"),
    (SCALE, None, r"up_proj.weight_scale is missing"),
    (SCALE.replace("scale", "shape"), None, r"up_proj.weight_shape is missing"),
    (PACKED, lambda t: t.float(), r"weight_packed must be torch.int32 \[128, 8\]; got torch.float32"),
    (PACKED, lambda t: t.T.contiguous(), r"weight_packed must be torch.int32 \[128, 8\]; got torch.int32 \[8, 128\]"),
    (PACKED, lambda t: t[:, :4].contiguous(), r"weight_packed must be torch.int32 \[128, 8\]"),
    (SCALE, lambda t: t.int(), "weight_scale must be one of"),
    (SCALE, lambda t: t[:, :1].contiguous(), r"weight_scale must be torch.float32 \[128, 2\]; got"),
    (SCALE, lambda t: t * float("nan"), "up_proj.weight_scale holds NaN, inf or zero"),
    (SCALE, lambda t: t / 0, "up_proj.weight_scale holds NaN, inf or zero"),
    (SCALE, lambda t: t * (torch.arange(len(t)) > 0)[:, None], "up_proj.weight_scale holds NaN, inf or zero"),
    (SCALE.replace("scale", "shape"), lambda t: t.flip(0), r"weight_shape must be \[128, 64\], as the model says"),
    (SCALE.replace("scale", "g_idx"), lambda t: t.int(), "weight_g_idx is not part of this scheme"),
    (SCALE.replace("scale", "zero_point"), lambda t: t.int(), "weight_zero_point is not part of this scheme"),
    (PACKED.replace("_packed", ""), lambda t: t, "up_proj.weight is not part of this scheme"),
    ("lm_head.weight_packed", lambda t: t.int(), "lm_head.weight_packed belongs to no linear that the config"),
    ("model.layers.9.mlp.up_proj.weight_scale", lambda t: t, "layers.9.mlp.up_proj.weight_scale belongs to no linear"),
    ("model.norm.weight", lambda t: t[:7].contiguous(), r"model.norm.weight must be \[64\]; got \[7\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_broken_checkpoints_are_refused_by_name(tmp_path: Path, name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = quantized(tmp_path / "a", method="rtn")
    rewrite(folder, name, change)
    with pytest.raises(llmq.LlmqError, match=message):
        llmq.load(folder)
    llmq.enable()
    try:
        with pytest.raises(llmq.LlmqError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        llmq.disable()


@pytest.mark.parametrize(
    ("arch", "name", "change", "message"),
    [
        ("llama", "model.norm.weight", None, "model.norm.weight is missing"),
        ("llama", "model.layers.1.self_attn.q_proj.bias", lambda t: t[0], "q_proj.bias is not part of this scheme"),
        ("qwen2", BIAS, None, "q_proj.bias is missing"),
        ("qwen2", BIAS, lambda t: t[:9].contiguous(), r"q_proj.bias must be torch.float32 \[64\]; got .*\[9\]"),
        ("llama", "model.layers.1.mlp.up_proj", None, "the config says that this linear is quantized"),
    ],
)
def test_half_of_a_linear_is_refused_by_name(tmp_path: Path, arch: str, name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = quantized(tmp_path / "a", arch, method="rtn")
    if name.endswith("proj"):  # dense where the config says packed
        for suffix in ("packed", "scale", "shape"):
            rewrite(folder, f"{name}.weight_{suffix}", None)
        rewrite(folder, f"{name}.weight", lambda _: torch.zeros(128, 64))
    else:
        rewrite(folder, name, change)
    with pytest.raises(llmq.LlmqError, match=message):
        llmq.load(folder)


def test_pickles_and_prefixes(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "a", method="rtn")
    want = logits(llmq.load(folder))
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(llmq.load(folder)), want), "transformers adds the base model's prefix"
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(llmq.LlmqError, match=r"pytorch_model\.bin; pickles are not read"):
        llmq.load(folder)


def test_what_is_not_ours_is_said(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    assert not quantizer.is_quantized(tmp_path / "plain")
    assert quantizer.is_quantized(quantized(tmp_path / "packed", method="rtn"))
    with pytest.raises(llmq.LlmqError, match="is not quantized"):
        llmq.load(tmp_path / "plain")
    with pytest.raises(llmq.LlmqError, match="is not a model folder or repo"):
        llmq.load(tmp_path / "absent")


REFUSED = [
    ({"group_size": 48}, {}, "group_size must divide the in_features of some linear: this model has 64 and 128"),
    ({"ignore": ("re:.*nothing",)}, {}, "matches no linear of this model"),
    ({"ignore": ("re:.*q_proj",)}, {}, "serving engines fuse them: ignore all of them or none"),
    ({}, {"max_shard_size": "many"}, "max_shard_size"),
]


@pytest.mark.parametrize(("changes", "arguments", "message"), REFUSED)
def test_bad_requests_are_refused_and_leave_nothing(tmp_path: Path, changes, arguments, message) -> None:  # type: ignore[no-untyped-def]
    config = llmq.QuantConfig(**{"group_size": 32, **changes})
    with pytest.raises(llmq.LlmqError, match=message):
        llmq.quantize(tiny_model("llama"), tmp_path / "out", config, WINDOWS, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nan_in_a_weight_is_named_and_leaves_nothing(tmp_path: Path, method: str) -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(llmq.LlmqError, match="model.layers.2.mlp.up_proj.weight holds NaN or inf"):
        llmq.quantize(model, tmp_path / "out", llmq.QuantConfig(method=method, group_size=32), WINDOWS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_inf_in_an_activation_names_block_and_linear(tmp_path: Path, method: str) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    with pytest.raises(llmq.LlmqError, match="the input of model.layers.1.mlp.down_proj holds NaN or inf"):
        llmq.quantize(model, tmp_path / "out", llmq.QuantConfig(method, group_size=32, scales="minmax"), WINDOWS)


def test_conv1d_and_existing_outputs_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(llmq.LlmqError, match="is a Conv1D"):
        llmq.quantize(gpt2, tmp_path / "out", llmq.QuantConfig(group_size=32), WINDOWS)
    folder = quantized(tmp_path / "a", method="rtn")
    with pytest.raises(llmq.LlmqError, match="--overwrite|overwrite"):
        quantized(folder)


def test_a_streamed_folder_gives_the_bytes_of_the_model_in_memory(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "source", max_shard_size="100kB")
    config = llmq.QuantConfig(group_size=32, dtype="float32")
    llmq.quantize(tmp_path / "source", tmp_path / "a", config, WINDOWS)
    llmq.quantize(tiny_model("qwen3"), tmp_path / "b", config, WINDOWS)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_preview_counts_what_is_then_written(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    config = llmq.QuantConfig(group_size=32)
    preview = llmq.preview(tmp_path / "source", config)
    report = llmq.quantize(tmp_path / "source", tmp_path / "a", config, WINDOWS)
    assert preview.after == report.checkpoint_bytes
    assert preview.after == sum(t.nbytes for t in load_file(tmp_path / "a" / "model.safetensors").values())
