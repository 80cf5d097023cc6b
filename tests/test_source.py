"""Sources load, block by block, what `from_pretrained` loads, under the names that `save_pretrained` writes."""

from __future__ import annotations

import copy
import json
import time
from functools import partial
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

import llmq
import llmq.hf.source as source_module
from llmq.checkpoint.reader import INDEX, SINGLE
from llmq.demo import demo_source
from llmq.errors import LlmqError
from llmq.hf import source_gguf
from llmq.hf.sidefiles import SideFiles
from llmq.hf.source import open_source
from llmq.hf.source_base import Source, quiet
from llmq.hf.source_memory import InMemorySource
from tests.tiny import ARCHITECTURES, randomize, tiny_config, tiny_model

IDS = torch.arange(3, 23)[None]

MOE = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def moe_model(arch: str) -> PreTrainedModel:
    """A tiny model whose experts are merged at load and split at save."""
    common = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 128}
    config = AutoConfig.for_model(arch, **(common | heads | MOE[arch]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    return model


def saved(model: PreTrainedModel, folder: Path, size: str = "100KB") -> Path:
    with quiet():
        model.save_pretrained(folder, max_shard_size=size)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def everything(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def load_all(source: Source) -> dict[str, Tensor]:
    """Load every part, keeping the blocks; returns the tensors to be written."""
    source.load_outer()
    tensors = dict(source.outer_tensors())
    for index in range(len(source)):
        source.load_block(index)
        tensors.update(source.block_tensors(index))
    return tensors


def planned_names(source: Source) -> set[str]:
    return {each.name for each in source.tensor_plan()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def all_models() -> list[Any]:
    return [pytest.param(partial(tiny_model, arch), id=arch) for arch in ARCHITECTURES] + [
        pytest.param(partial(moe_model, arch), id=arch) for arch in MOE
    ]


@pytest.mark.parametrize("make", all_models())
def test_a_folder_source_loads_what_from_pretrained_loads(make: Any, tmp_path: Path) -> None:
    folder = saved(make(), tmp_path / "source")
    assert (folder / INDEX).exists()
    expected = loaded(folder)
    source = open_source(folder)
    assert source.streamed
    assert source.dtype == torch.bfloat16
    assert any("float32" in note for note in source.notes)
    assert {t.device.type for t in source.model.parameters()} == {"meta"}
    plan = {each.name: each for each in source.tensor_plan()}
    assert set(plan) == set(stored(folder))
    tensors = load_all(source)
    assert_same(everything(source.model), everything(expected))
    with torch.no_grad():
        assert torch.equal(source.model(IDS).logits, expected(IDS).logits)
    assert not any(parameter.requires_grad for parameter in source.model.parameters())
    assert_same(tensors, stored(saved(expected, tmp_path / "again")))
    for name, each in plan.items():
        assert (each.spec.dtype, each.spec.shape) == (tensors[name].dtype, tuple(tensors[name].shape))


@pytest.mark.parametrize("make", all_models())
def test_an_in_memory_source_equals_a_folder_source(make: Any, tmp_path: Path) -> None:
    model = make()
    folder = saved(model, tmp_path)
    streamed, in_memory = open_source(folder), open_source(model)
    assert not in_memory.streamed
    assert set(in_memory.tensor_plan()) == set(streamed.tensor_plan())
    assert_same(load_all(in_memory), load_all(streamed))
    assert_same(everything(in_memory.model), everything(streamed.model))


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "bloom"])
def test_one_block_has_data_at_a_time(arch: str, tmp_path: Path) -> None:
    source = open_source(saved(tiny_model(arch), tmp_path))
    blocks = source.model.get_submodule(source.blocks_name)
    source.load_outer()
    for index in range(len(source)):
        block = source.load_block(index)
        assert block is blocks[index]
        with_data = [i for i, other in enumerate(blocks) if any(p.device.type != "meta" for p in other.parameters())]
        assert with_data == [index]
        source.release_block(index)
        assert {t.device.type for t in block.parameters()} == {"meta"}
        with pytest.raises(LlmqError, match=f"block {index} must be loaded"):
            list(source.block_tensors(index))


def test_a_block_can_be_loaded_again(tmp_path: Path) -> None:
    source = open_source(saved(tiny_model("llama"), tmp_path))
    before = {name: tensor.clone() for name, tensor in source.load_block(1).state_dict().items()}
    for parameter in source.load_block(1).parameters():
        parameter.data.zero_()
    source.release_block(1)
    assert_same(source.load_block(1).state_dict(), before)


def test_names_of_parameters_in_the_plan(tmp_path: Path) -> None:
    source = open_source(saved(tiny_model("falcon"), tmp_path))
    entries = dict(source.model.state_dict())
    for each in source.tensor_plan():
        assert each.parameter is not None
        assert tuple(entries[each.parameter].shape) == each.spec.shape
        if each.parameter.endswith(".weight"):
            assert f"{source.checkpoint_name(each.parameter.removesuffix('.weight'))}.weight" == each.name
    assert source.checkpoint_name("lm_head") == "lm_head"  # tied, and written under another name


def test_merged_weights_have_no_name_of_their_own(tmp_path: Path) -> None:
    source = open_source(saved(moe_model("mixtral"), tmp_path))
    computed = [each.name for each in source.tensor_plan() if each.parameter is None]
    assert len(computed) == 2 * 4 * 3
    assert source.checkpoint_name("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    with pytest.raises(LlmqError, match="merged or split"):
        source.checkpoint_name("model.layers.0.mlp.experts.gate_up_proj")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_requested_dtype_is_used(dtype: str, tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    folder = saved(model, tmp_path)
    for original in (folder, model):
        source = open_source(original, dtype=dtype, tokenizer=tiny_tokenizer())
        assert source.dtype == getattr(torch, dtype)
        assert source.notes == ()
        load_all(source)
        assert_same(everything(source.model), everything(loaded(folder, getattr(torch, dtype))))


def test_auto_keeps_half_precision(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama").half(), tmp_path)
    assert open_source(folder).dtype == torch.float16
    assert open_source(loaded(folder, torch.float16)).dtype == torch.float16
    assert open_source(folder).notes == ()


def test_the_callers_model_is_not_changed() -> None:
    model = tiny_model("qwen2").train()
    before = {name: tensor.clone() for name, tensor in everything(model).items()}
    identities = {name: id(tensor) for name, tensor in everything(model).items()}
    config = copy.deepcopy(model.config.to_dict())
    source = open_source(model)
    source.load_outer()
    for index in range(len(source)):
        for parameter in source.load_block(index).parameters():
            parameter.data.fill_(7)
        assert all(bool((tensor == 7).all()) for _, tensor in source.block_tensors(index))
        source.release_block(index)
    assert {name: id(tensor) for name, tensor in everything(model).items()} == identities
    assert_same(everything(model), before)
    assert model.config.to_dict() == config
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same(
        source.load_block(0).state_dict(), {k: v.bfloat16() for k, v in model.model.layers[0].state_dict().items()}
    )


def test_blocks_of_a_loaded_model_are_copies_even_without_a_cast() -> None:
    model = tiny_model("llama").bfloat16()
    source = open_source(model)
    block = source.load_block(2)
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in block.parameters())


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> Path:
    """Store the folder's tensors again in one file, with some replaced, added or (None) left out."""
    tensors: dict[str, Tensor | None] = {**stored(folder), **change}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(
        {k: v.contiguous() for k, v in tensors.items() if v is not None}, folder / SINGLE, metadata={"format": "pt"}
    )
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def test_tied_weights_stored_twice_are_tied(tmp_path: Path) -> None:
    folder = saved(tiny_model("gemma2"), tmp_path)
    rewrite(folder, {"lm_head.weight": stored(folder)["model.embed_tokens.weight"].clone()})
    source = open_source(folder)
    assert "lm_head.weight" not in planned_names(source)
    source.load_outer()
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight


def test_tied_weights_that_differ_stay_two(tmp_path: Path) -> None:
    folder = saved(tiny_model("gemma2"), tmp_path / "source")
    rewrite(folder, {"lm_head.weight": stored(folder)["model.embed_tokens.weight"] * 2})
    source = open_source(folder)
    assert any("differ" in note for note in source.notes)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= planned_names(source)
    load_all(source)
    assert_same(everything(source.model), everything(loaded(folder)))
    (tmp_path / "out").mkdir()
    source.write_side_files(tmp_path / "out", {"quant_method": "x"})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_weights_stored_under_the_other_name(tmp_path: Path) -> None:
    folder = saved(tiny_model("gemma2"), tmp_path)
    embeddings = stored(folder)["model.embed_tokens.weight"]
    rewrite(folder, {"model.embed_tokens.weight": None, "lm_head.weight": embeddings})
    source = open_source(folder)
    assert "model.embed_tokens.weight" in planned_names(source)
    load_all(source)
    assert_same(everything(source.model), everything(loaded(folder)))


def test_stored_tensors_that_the_model_lacks_are_noted(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path)
    rewrite(folder, {"model.mtp.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    source = open_source(folder)
    assert [note for note in source.notes if "model.mtp.weight" in note] == [source.notes[-1]]
    assert source.notes[-1].startswith("1 stored")


def refused(source: Any, *words: str, **kwargs: Any) -> None:
    with pytest.raises(LlmqError) as caught:
        open_source(source, **kwargs)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.2.mlp.up_proj.weight", None, ("lacks model.layers.2.mlp.up_proj.weight", "LlamaForCausalLM")),
        ("lm_head.weight", None, ("lacks lm_head.weight",)),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(64, 128), ("[64, 128]", "[128, 64]")),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(128, 64).to(torch.int8), ("int8", "quantized already")),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(128, 64).to(torch.float8_e4m3fn), ("quantized already",)),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    name: str, value: Tensor | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    refused(rewrite(saved(tiny_model("llama"), tmp_path), {name: value}), *words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "nonsense"}, ("nonsense", "does not know model_type")),
        ({"model_type": None}, ("does not know model_type None",)),
        ({"model_type": ["llama"]}, ("does not know model_type ['llama']",)),
        ({"model_type": "nonsense", "auto_map": {"AutoModel": "modeling_x.X"}}, ("auto_map", "never run")),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, ("encoder-decoder",)),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, ("no causal language model for vit",)),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            ("models that predict tokens", "SequenceClassification"),
        ),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            ("models that predict tokens", "BertForMaskedLM"),
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantized already", "gptq")),
        ({"num_hidden_layers": "many"}, ("config.json", "llama")),
        ({"num_hidden_layers": 5}, ("lacks", "layers.4")),
    ],
)
def test_configs_that_are_refused(values: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    refused(change_config(saved(tiny_model("llama"), tmp_path), **values), *words)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such folder", "absent")
    refused("./absent", "no such folder")
    refused("some/where/deep", "no such folder")
    refused("", "no such folder")
    refused(tmp_path / "absent.gguf", "no such file", "absent.gguf")
    refused(3, "int")
    refused(tmp_path, "has neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin", "pickles are not read")
    folder = saved(tiny_model("llama"), tmp_path / "whole")
    refused(folder, "revision", revision="main")
    refused(folder, "int8", dtype="int8")
    refused(folder / "config.json", "a file")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "JSON")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_loaded_models_that_are_refused() -> None:
    refused(nn.Linear(2, 2), "PreTrainedModel", "Linear")
    refused(tiny_model("llama").model, "no output embeddings")
    with torch.device("meta"):
        refused(AutoModelForCausalLM.from_config(tiny_config("llama")), "on meta")
    quantized = tiny_model("llama")
    quantized.config.quantization_config = {"quant_method": "awq"}
    refused(quantized, "quantized already", "awq")


@pytest.mark.parametrize("kind", ["llama", "nonsense"])
def test_code_that_comes_with_a_model_is_never_run(kind: str, tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path / "source")
    mark = tmp_path / "executed"
    (folder / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w')\n")
    code = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M", "AutoTokenizer": "modeling_x.T"}
    change_config(folder, model_type=kind, auto_map=code, trust_remote_code=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["modeling_x.T", None]}}))
    if kind == "nonsense":
        refused(folder, "never run")
    else:
        source = open_source(folder)
        load_all(source)
        with pytest.raises(LlmqError, match="no tokenizer"):
            source.tokenizer()
        (tmp_path / "out").mkdir()
        source.write_side_files(tmp_path / "out", {"quant_method": "x"})
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["config.json", "generation_config.json", "tokenizer_config.json"]
        assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
        assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert not mark.exists()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_side_files_of_a_folder(tmp_path: Path) -> None:
    folder, out = saved(tiny_model("llama"), tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 2}')
    for name in ("tokenizer.py", "vocab.bin", "pytorch_model.bin", "README.md", "training_args.bin"):
        (folder / name).write_text("no")
    source = open_source(folder)
    source.write_side_files(out, {"quant_method": "compressed-tensors", "bits": 4})
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == copied | {"config.json", "additional_chat_templates"}
    for name in (*copied, "additional_chat_templates/tools.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "compressed-tensors", "bits": 4}
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert source.tokenizer()("w5 w6")["input_ids"] == [5, 6]
    assert not hasattr(source.config, "quantization_config")


def test_side_files_of_a_loaded_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plain = open_source(model)
    with pytest.raises(LlmqError, match="save model and tokenizer to one folder"):
        plain.tokenizer()
    plain.write_side_files(tmp_path, {"quant_method": "x"})
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json"}
    with_tokenizer = open_source(model, tokenizer=tiny_tokenizer())
    with_tokenizer.write_side_files(tmp_path, {"quant_method": "x"})
    assert (tmp_path / "tokenizer.json").exists()


def test_a_missing_tokenizer_is_noted_before_and_after_the_files_are_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cast = "the source is float32: cast to bfloat16 (dtype auto)"
    for tokenizer, count in ((None, 2), (tiny_tokenizer(), 1)):
        source = open_source(model, tokenizer=tokenizer)
        before = source.notes
        assert len(before) == count
        assert before[0] == cast
        assert all(note.startswith("the checkpoint has no tokenizer: the loaded model") for note in before[1:])
        for _ in range(2):
            source.write_side_files(tmp_path, {"quant_method": "x"})
        assert source.notes == before
    moved = saved(model, tmp_path / "moved")
    model.name_or_path = str(moved)
    late = open_source(model)
    assert late.notes[1].startswith(f"the checkpoint has no tokenizer: {moved} has no tokenizer that can be loaded")
    tiny_tokenizer().save_pretrained(moved)  # too late: what was noted stays true
    (tmp_path / "late").mkdir()
    late.write_side_files(tmp_path / "late", {"quant_method": "x"})
    assert not (tmp_path / "late" / "tokenizer.json").exists()
    with pytest.raises(LlmqError, match="no tokenizer that can be loaded"):
        late.tokenizer()


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_side_files_do_not_depend_on_what_is_loaded(kind: str, tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    folder = saved(model, tmp_path / "source")
    tiny_tokenizer().save_pretrained(folder)
    source = open_source(
        folder if kind == "folder" else model, tokenizer=None if kind == "folder" else tiny_tokenizer()
    )
    written = []
    for name in ("before", "after"):
        out = tmp_path / name
        out.mkdir()
        source.write_side_files(out, {"quant_method": "x"})
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
        load_all(source)
        source.release_block(0)
    assert written[0] == written[1]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(written[0])


class Unsaved:
    """A tokenizer that cannot be saved."""

    bos_token_id, eos_token_id, all_special_ids = 1, 2, (0, 1, 2)

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def save_pretrained(self, folder: Path) -> None:
        raise TypeError("Object of type Vocabulary is not JSON serializable\nsecond line")


def test_a_tokenizer_that_cannot_be_saved_fails_before_a_block_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a block was loaded")

    monkeypatch.setattr(InMemorySource, "load_block", loaded)
    monkeypatch.setattr(InMemorySource, "load_outer", loaded)
    monkeypatch.setattr(SideFiles, "_load", lambda self: Unsaved())
    message = "the tokenizer of the source cannot be saved: Object of type Vocabulary is not JSON serializable"
    with pytest.raises(LlmqError) as caught:
        llmq.quantize(tiny_model("llama"), tmp_path / "new" / "out", llmq.QuantConfig("gptq", group_size=32))
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["config", "generation_config"])
def test_a_config_that_cannot_be_saved_is_refused(broken: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    getattr(model, broken).extra = object()
    with pytest.raises(LlmqError, match=rf"^{broken}\.json of the source cannot be saved: .*JSON"):
        open_source(model).write_side_files(tmp_path, {"quant_method": "x"})


def test_references_to_code_in_a_saved_tokenizer_are_removed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["modeling_x.T", None]}
    tokenizer.save_pretrained(tmp_path)
    assert "auto_map" in (tmp_path / "tokenizer_config.json").read_text()
    open_source(tiny_model("llama"), tokenizer=tokenizer).write_side_files(tmp_path, {"quant_method": "x"})
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    source = open_source(saved(tiny_model("llama"), tmp_path))
    with pytest.raises(LlmqError, match=r"no tokenizer.*tokenizer\.json"):
        source.tokenizer()


def test_a_repo_id_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, commit = tmp_path / "models--some--model", "0123456789abcdef0123456789abcdef01234567"
    saved(tiny_model("llama"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    patterns = []

    def cached(name: str, **kwargs: Any) -> str:
        patterns.extend(kwargs["allow_patterns"])
        return snapshot_download(name, cache_dir=tmp_path, local_files_only=True, **kwargs)

    monkeypatch.setattr(source_module, "snapshot_download", cached)
    source = open_source("some/model")
    assert len(load_all(source)) == len(source.tensor_plan())
    assert {Path(each).suffix for each in patterns if each.startswith("model-")} == {".safetensors"}
    assert not any(each.endswith((".bin", ".py")) for each in patterns)
    assert open_source("some/model", revision=commit).dtype == torch.bfloat16
    refused("some/other", "there is no folder some/other", "the hub repo some/other could not be downloaded")
    refused("some/model", "at v9", revision="v9")


def hub_settings() -> tuple[int, bool, bool]:
    return hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), are_progress_bars_disabled()


def test_quiet_threads_that_overlap_restore_the_settings() -> None:
    """The first thread to enter is also the first to leave."""
    before, entered, left = hub_settings(), Event(), Event()
    inside: list[int] = []

    def first() -> None:
        with quiet():
            assert entered.wait(10)
        left.set()

    def second() -> None:
        with quiet():
            entered.set()
            assert left.wait(10)
            inside.append(hf_logging.get_verbosity())

    thread = Thread(target=first)
    thread.start()
    while hf_logging.get_verbosity() == before[0] and thread.is_alive():
        time.sleep(0.001)
    second()
    thread.join()
    assert inside == [hf_logging.ERROR]
    assert hub_settings() == before


def test_threads_that_read_gguf_files_leave_the_readers_functions_as_they_were() -> None:
    gguf = pytest.importorskip("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map, source_gguf.hf_gguf.tqdm
    inside, most = [0], []
    entered = Barrier(2)

    def read(delay: float) -> None:
        entered.wait(10)
        with source_gguf._read_once():
            inside[0] += 1
            most.append(inside[0])
            time.sleep(delay)
            inside[0] -= 1

    threads = [Thread(target=read, args=(delay,)) for delay in (0.05, 0.2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, source_gguf.hf_gguf.tqdm) == before


def test_nothing_is_printed_and_settings_are_restored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = saved(tiny_model("llama"), tmp_path)
    capfd.readouterr()
    before = hub_settings()
    load_all(open_source(folder))
    assert hub_settings() == before
    assert capfd.readouterr() == ("", "")


def test_the_demo_model_is_read_from_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        demo = demo_source()
    except LlmqError as error:
        pytest.skip(str(error))
    capfd.readouterr()
    source = open_source(demo)
    assert capfd.readouterr() == ("", "")
    assert not source.streamed
    assert source.dtype == torch.bfloat16
    assert len(source) == 30
    assert any("cannot be streamed" in note for note in source.notes)
    assert "lm_head.weight" not in planned_names(source)
    source.load_outer()
    names = dict(source.outer_tensors())
    names.update(dict.fromkeys(name for i in range(30) if source.load_block(i) for name, _ in source.block_tensors(i)))
    assert set(names) == planned_names(source)
    source.write_side_files(tmp_path, {"quant_method": "x"})
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= files
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {"quant_method": "x"}
    assert source.tokenizer().decode(source.tokenizer()("Hello there")["input_ids"]) == "Hello there"


def test_a_broken_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(tmp_path / "model.gguf", "model.gguf", "GGUF")
