"""Sources that are broken, incomplete or unlike their config are refused by name, and what travels beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import llmq
from llmq.errors import LlmqError
from llmq.evaluation import generate_text
from llmq.hf.source_gguf import refuse_incomplete
from tests.fixtures import tiny_tokenizer
from tests.tiny import HIDDEN, VOCAB, tiny_model

RTN = llmq.QuantConfig("rtn", group_size=32, dtype="float32")


def saved(model: PreTrainedModel, folder: Path, **changes: object) -> Path:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "no_such"},
        {"pad_token_id": VOCAB},
        {"_attn_implementation": "flash_attention_2"},
        {"rope_parameters": {"rope_type": "no_such", "rope_theta": 1.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_builds_no_model_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, object]) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source", **changes)
    with pytest.raises(LlmqError, match=r"LlamaForCausalLM cannot be built from config\.json|does not describe"):
        llmq.quantize(source, tmp_path / "out", RTN)


@pytest.mark.parametrize("held", [False, True], ids=["streamed", "held"])
@pytest.mark.parametrize(
    ("value", "dtype"), [("nan", "float32"), ("-inf", "float32"), ("1e6", "float16")], ids=["nan", "inf", "overflow"]
)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_what_is_not_finite_outside_the_blocks_is_refused(
    tmp_path: Path, name: str, value: str, dtype: str, held: bool
) -> None:
    model = tiny_model("llama", layers=1)
    model.get_parameter(name).data.view(-1)[7] = float(value)
    source = model if held else saved(model, tmp_path / "source")
    with pytest.raises(LlmqError, match=f"{name} holds NaN or inf.*overflows in {dtype}"):
        llmq.quantize(source, tmp_path / "out", llmq.QuantConfig("rtn", group_size=32, dtype=dtype))
    assert not (tmp_path / "out").exists()


def _cut(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:1]


def _narrower(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj = nn.Linear(HIDDEN, 96, bias=False)


def _head_bias(model: PreTrainedModel) -> None:
    model.lm_head = nn.Linear(HIDDEN, VOCAB)


def _buffer(model: PreTrainedModel) -> None:
    model.model.norm.register_buffer("shift", torch.ones(HIDDEN))


def _states_a_tie(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = True


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_cut, "layers.1"),
        (_narrower, r"up_proj.weight is \[96, 64\]"),
        (_head_bias, "lm_head.bias"),
        (_buffer, "norm.shift"),
        (_states_a_tie, "ties lm_head.weight"),
    ],
)
def test_a_loaded_model_unlike_its_config_is_refused(
    tmp_path: Path, change: Callable[[PreTrainedModel], None], named: str
) -> None:
    model = tiny_model("llama", layers=2)
    change(model)
    with pytest.raises(LlmqError, match=f"must be as its config describes it.*{named}"):
        llmq.quantize(model, tmp_path / "out", RTN)


def test_adapters_are_refused_alone_and_noted_beside_a_model(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    whole = saved(tiny_model("llama", layers=1), tmp_path / "whole")
    for folder in (alone, whole):
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
        (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(LlmqError, match=r"holds adapters .* load owner/base with peft, merge them"):
        llmq.quantize(alone, tmp_path / "out", RTN)
    (whole / "adapter_model.safetensors").unlink()
    report = llmq.quantize(whole, tmp_path / "out", RTN)
    assert any("holds adapters beside the model" in note for note in report.notes)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_data_files_travel_and_the_rest_is_noted(tmp_path: Path) -> None:
    source = saved(tiny_model("llama", layers=1), tmp_path / "source")
    data = (
        "processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
        "spiece.model",
        "words.txt",
    )
    for name in data:
        (source / name).write_text('{"auto_map": {"AutoProcessor": "own.Processor"}, "a": 1}')
    for name in ("own.py", "pytorch_model.bin", "tf_model.h5", "README.md"):
        (source / name).write_text("x")
    report = llmq.quantize(source, tmp_path / "out", RTN)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {*data, "config.json", "generation_config.json", "llmq_report.json", "model.safetensors"}
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == {"a": 1}
    assert "not copied from the source: own.py, pytorch_model.bin, tf_model.h5" in report.notes


def test_ids_of_texts_and_prompts_must_be_in_the_embedding(tmp_path: Path) -> None:
    source = saved(tiny_model("llama", layers=1), tmp_path / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("w5 w6 <new> w7 " * 100)
    with pytest.raises(LlmqError, match=f"vocabulary of {VOCAB}.* to {VOCAB}.*resize_token_embeddings"):
        llmq.quantize(
            source,
            tmp_path / "out",
            llmq.QuantConfig(group_size=32),
            llmq.Calibration(str(tmp_path / "text.txt"), 4, 32),
        )
    with pytest.raises(LlmqError, match="token ids of the prompt must be in the model's vocabulary"):
        generate_text(source, "w5 <new>", max_new_tokens=2, stream=False)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [("m.gguf", "download or convert it again"), ("m-00001-of-00003.gguf", "part 1 of 3: merge the parts first")],
)
def test_a_gguf_file_without_some_parameters_is_refused(file: str, remedy: str) -> None:
    model = tiny_model("llama", layers=1)
    refuse_incomplete(Path(file), model, [])
    with pytest.raises(LlmqError, match=f"{file} lacks model.norm.weight, which LlamaForCausalLM needs; .*{remedy}"):
        refuse_incomplete(Path(file), model, ["model.norm.weight"])
