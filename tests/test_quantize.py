"""`quantize` on whole models: what it writes, byte for byte, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import llmq
from llmq.quantization import block as block_module
from llmq.serving.linear import QuantLinear
from tests.fixtures import WINDOWS, float32_checkpoint
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("method", "actorder"), [("rtn", None), ("awq", None), ("gptq", "weight"), ("awq+gptq", "weight")]
)
def test_activation_order_is_recorded_for_gptq_only(tmp_path: Path, method: str, actorder: str | None) -> None:
    folder = float32_checkpoint(tmp_path / "a", method=method)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["actorder"] for group in config["config_groups"].values()} == {actorder}


def test_linears_of_one_input_share_the_seconds_of_observing_and_rounding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking a block apart and searching scales is nobody's."""
    find_pairs, waited = block_module.find_pairs, 0.3

    def slow(*arguments: object) -> object:
        time.sleep(waited)
        return find_pairs(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(block_module, "find_pairs", slow)
    report = llmq.quantize(tiny_model("llama"), tmp_path / "out", llmq.QuantConfig(group_size=32), WINDOWS)
    q, k, v = report.layers[:3]
    assert q.seconds == k.seconds == v.seconds > 0
    assert sum(row.seconds for row in report.layers) <= report.seconds - 4 * waited


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    files = [(float32_checkpoint(tmp_path / name) / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_linears_that_the_group_size_does_not_divide_get_another(tmp_path: Path) -> None:
    report = llmq.quantize(
        tiny_model("llama"), tmp_path / "a", llmq.QuantConfig(group_size=128, dtype="float32"), WINDOWS
    )
    assert any("128 does not divide 64: groups of 64" in line for line in report.fallbacks)
    model = llmq.load(tmp_path / "a")
    assert {m.scheme.weight.group_size for m in model.modules() if isinstance(m, QuantLinear)} == {64, 128}


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
        llmq.quantize(
            model,
            tmp_path / "out",
            llmq.QuantConfig(method=method, group_size=32),
            None if method == "rtn" else WINDOWS,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_inf_in_an_activation_names_block_and_linear(tmp_path: Path, method: str) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    with pytest.raises(llmq.LlmqError, match="the input of model.layers.1.mlp.down_proj holds NaN or inf"):
        llmq.quantize(model, tmp_path / "out", llmq.QuantConfig(method, group_size=32, scales="minmax"), WINDOWS)


def test_existing_outputs_are_refused(tmp_path: Path) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    with pytest.raises(llmq.LlmqError, match="--overwrite|overwrite"):
        float32_checkpoint(folder)
