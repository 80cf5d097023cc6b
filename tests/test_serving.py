"""Quantize, save, load, run: the whole journey on every architecture, and what serving must refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmq
from llmq.hf import serving
from llmq.linear import QuantLinear
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

IDS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(2))


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


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loaded_logits_equal_those_of_the_dequantized_model(tmp_path: Path, arch: str, symmetric: bool) -> None:
    original = tiny_model(arch)
    before = copy.deepcopy(original.state_dict())
    config = llmq.QuantConfig(group_size=32, symmetric=symmetric, dtype="float32")
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


def test_prefill_and_decode_keep_their_layouts_side_by_side(tmp_path: Path) -> None:
    linear = next(m for m in llmq.load(quantized(tmp_path / "a")).modules() if isinstance(m, QuantLinear))
    for rows in (1, 512, 1):
        linear(torch.randn(rows, linear.in_features))
    few = linear._prepared(linear.choice(torch.float32, 1).kernel, torch.float32)
    linear(torch.randn(512, linear.in_features))
    assert linear._prepared(linear.choice(torch.float32, 1).kernel, torch.float32) is few


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    files = [(quantized(tmp_path / name) / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_enable_makes_plain_from_pretrained_packed_and_disable_undoes_it(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "a")
    expected = logits(llmq.load(folder))
    llmq.enable()
    try:
        llmq.enable()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert any(isinstance(m, QuantLinear) for m in model.modules())
        assert torch.equal(logits(model), expected)
    finally:
        llmq.disable()
    assert serving.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is serving.STOCK_CONFIG


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
    rows = llmq.explain(llmq.load(quantized(tmp_path / "a")))
    assert len(rows) == 28
    assert (rows[0].few_rows, rows[0].many_rows) == ("cpu_int4", "slab")
    assert "cpu_int4 is the faster one up to" in str(rows[0])
    asymmetric = llmq.explain(llmq.load(quantized(tmp_path / "b", symmetric=False)))
    assert "takes symmetric weights" in str(asymmetric[0])


PACKED = "model.layers.1.mlp.up_proj.weight_packed"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PACKED, None, "weight_packed is missing"),
        (SCALE, None, "weight_scale is missing"),
        (PACKED, lambda t: t.float(), "weight_packed must be torch.int32"),
        (PACKED, lambda t: t.T.contiguous(), "weight_packed must be"),
        (SCALE, lambda t: t * float("nan"), "holds NaN, inf or zero"),
        (SCALE, lambda t: t * 0, "holds NaN, inf or zero"),
        (SCALE.replace("scale", "shape"), lambda t: t.flip(0), "weight_shape must be"),
        (SCALE.replace("scale", "g_idx"), lambda t: torch.zeros(64, dtype=torch.int32), "not part of this scheme"),
    ],
)
def test_broken_checkpoints_are_refused_by_name(tmp_path: Path, name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = quantized(tmp_path / "a", method="rtn")
    tensors = load_file(folder / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(llmq.LlmqError, match=message):
        llmq.load(folder)


def test_what_is_not_ours_is_said(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "plain")
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


def test_inf_in_an_activation_names_block_and_linear(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    with pytest.raises(llmq.LlmqError, match="the input of model.layers.1.mlp.down_proj holds NaN or inf"):
        llmq.quantize(model, tmp_path / "out", llmq.QuantConfig(group_size=32, scales="minmax"), WINDOWS)


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
