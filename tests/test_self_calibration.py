"""Text that a model writes itself: drawn from its own distribution, full windows, the same every time, nothing else touched."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import llmq
from llmq.calibration import Writing, read_dataset
from llmq.errors import LlmqError
from llmq.hf import self_calibration
from llmq.hf.self_calibration import how_texts_start, write_windows
from llmq.hf.source import open_source
from llmq.report import CalibrationUsed
from tests.tiny import ARCHITECTURES, HIDDEN, VOCAB, tiny_model

BOS, EOS = 1, 2


class Words:
    """What is asked of a tokenizer: how many tokens, and which are special."""

    def __init__(self, bos: int | None = BOS, words: int = VOCAB) -> None:
        self.bos_token_id, self.eos_token_id, self.all_special_ids, self._words = bos, EOS, [0, 1, 2], words

    def __len__(self) -> int:
        return self._words


def opened(model: Any, tokenizer: Any = None) -> Any:
    return open_source(model, dtype="float32", tokenizer=tokenizer or Words())


def write(source: Any, count: int, length: int, seed: int = 0, **told: Any) -> torch.Tensor:
    return write_windows(source, how_texts_start(source), count, length, seed, **told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a word tokenizer that has a BOS and an EOS."""
    folder = tmp_path_factory.mktemp("self") / "model"
    tiny_model("llama").save_pretrained(folder)
    words = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": i + 3 for i in range(VOCAB - 3)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    made.save_pretrained(folder)
    return folder


@torch.no_grad()
def transcribed(model: Any, draws: torch.Tensor, firsts: list[int], ends: set[int]) -> list[list[int]]:
    """The same text without a cache, a window and a token at a time."""
    found = []
    for numbers in draws.tolist():
        ids = [firsts[math.floor(numbers[0] * len(firsts))]]
        for at in numbers[1:]:
            chances = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), 0).tolist()
            reached, token = 0.0, 0
            for token, chance in enumerate(chances):  # noqa: B007
                reached += chance
                if reached > at * sum(chances):
                    break
            ids.append(firsts[math.floor(at * len(firsts))] if ids[-1] in ends else token)
        found.append(ids)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_is_drawn_from_the_models_own_distribution(arch: str) -> None:
    """Sliding windows, position embeddings and ALiBi included: the cached text is that of plain forwards."""
    model = tiny_model(arch, layers=2)
    draws = torch.rand(2, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert write(opened(model), 2, 20, 3).tolist() == transcribed(model, draws, [BOS], {EOS})


def test_without_a_bos_a_text_begins_with_any_ordinary_token() -> None:
    model = tiny_model("llama", layers=1)
    source = opened(model, Words(bos=None, words=100))
    start = how_texts_start(source)
    assert start.tokens.tolist() == list(range(3, 100))
    draws = torch.rand(18, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = write(source, 18, 30)
    assert found.tolist() == transcribed(model, draws, start.tokens.tolist(), {EOS})
    assert len(set(found[:, 0].tolist())) > 10


def test_windows_are_full_and_texts_that_end_are_followed_by_new_ones() -> None:
    found = write(opened(tiny_model("llama", layers=1)), 20, 100)
    assert found.shape == (20, 100)
    assert found.dtype == torch.int64
    assert 0 <= int(found.min()) <= int(found.max()) < VOCAB
    assert set(found[:, 0].tolist()) == {BOS}
    ended = found[:, :-1] == EOS
    assert int(ended.sum()) > 5
    assert set(found[:, 1:][ended].tolist()) == {BOS}


def test_same_seed_same_text_however_many_windows_follow() -> None:
    source = opened(tiny_model("llama"))
    few, many = write(source, 3, 24, 5), write(source, self_calibration.ROWS + 2, 24, 5)
    assert torch.equal(few, many[:3])
    assert torch.equal(many, write(source, self_calibration.ROWS + 2, 24, 5))
    assert not torch.equal(few, write(source, 3, 24, 6))
    assert len({tuple(row) for row in many.tolist()}) == len(many)


@pytest.mark.parametrize("length", [1, 2, self_calibration.WARMING + 2])
def test_the_shortest_windows(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_calibration, "TOLD_EVERY", 0.0)
    count = self_calibration.ROWS * (self_calibration.TIMED + 2)  # as many batches as an estimate takes steps
    assert write(opened(tiny_model("llama", layers=1)), count, length).shape == (count, length)


def test_nothing_of_the_callers_changes_and_nothing_of_it_changes_the_text(tmp_path: Path) -> None:
    plain, model = tiny_model("llama"), tiny_model("llama").train()
    odd = {"repetition_penalty": 9.0, "top_k": 1, "do_sample": True, "max_length": 3, "suppress_tokens": [5, 6]}
    for name, value in odd.items():
        setattr(model.generation_config, name, value)
    settings = model.generation_config.to_dict()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    source = opened(model)
    assert torch.equal(write(source, 2, 16), write(opened(plain), 2, 16))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.to_dict() == settings == source.model.generation_config.to_dict()


def test_a_streamed_model_is_whole_only_while_it_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(folder, dtype="float32")

    def loaded() -> list[bool]:
        return [not p.is_meta for i in range(len(source)) for p in source._blocks[i].parameters()]

    def stop(done: int, total: int, left: float | None) -> None:
        if done:
            assert all(loaded())
            raise KeyboardInterrupt

    monkeypatch.setattr(self_calibration, "TOLD_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        write(source, 2, 16, told=stop)
    assert not any(loaded())
    assert torch.equal(write(source, 2, 16), write(opened(tiny_model("llama")), 2, 16))
    assert not any(loaded())


def test_the_cost_is_told_before_the_first_token_and_measured_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_calibration, "TOLD_EVERY", 0.0)
    told: list[tuple[int, int, float | None]] = []
    count, length = self_calibration.ROWS + 2, 32
    write(opened(tiny_model("llama", layers=1)), count, length, told=lambda *each: told.append(each))
    assert told[0] == (0, count * length, None)
    done = [each[0] for each in told]
    assert done == sorted(done)
    assert done[-1] == count * length
    left = [each[2] for each in told if each[2] is not None]
    assert len(left) == len(told) - self_calibration.TIMED - self_calibration.WARMING
    assert min(left) >= 0
    assert left[-1] == 0


def test_the_estimate_follows_steps_that_take_longer_and_longer() -> None:
    clock = self_calibration._Clock(40, 100, lambda *told: None)
    clock.begin(16)
    clock._times = [(n, 1 + n / 10) for n in range(5, 20)]
    clock._tokens = 20
    first = sum(1 + n / 10 for n in range(20, 100))
    whole = sum(1 + n / 10 for n in range(100))
    assert clock._left() == pytest.approx(first + 2 * whole, rel=1e-3)


def test_a_model_that_overflows_says_so() -> None:
    model = tiny_model("llama", layers=1)
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(LlmqError, match="wrote NaN or inf instead of text"):
        write(opened(model), 1, 8)


@pytest.mark.parametrize("tokenizer", [Words(bos=VOCAB), Words(bos=None, words=3)], ids=["foreign bos", "no words"])
def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer: Words) -> None:
    with pytest.raises(LlmqError, match="must begin texts with a token of the model's 128"):
        how_texts_start(opened(tiny_model("llama", layers=1), tokenizer))


def test_without_a_tokenizer_it_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    config, asked = llmq.QuantConfig(group_size=32), llmq.Calibration("self", 2, 16)
    with pytest.raises(
        LlmqError, match="dataset self needs the model's tokenizer.*does not say where its tokenizer is"
    ):
        llmq.quantize(model, tmp_path / "deep" / "out", config, asked)
    with pytest.raises(LlmqError, match="dataset self needs the model's tokenizer"):
        llmq.preview(model, config, asked)
    assert list(tmp_path.iterdir()) == []


def test_only_calibration_text_is_written() -> None:
    with pytest.raises(LlmqError, match="name a text to evaluate on"):
        read_dataset("self", "evaluation")


def test_quantizing_on_it_is_quantizing_on_its_tokens(folder: Path, tmp_path: Path) -> None:
    config, asked = llmq.QuantConfig(group_size=32), llmq.Calibration("self", 6, 24, seed=4)
    seen: list[Any] = []
    report = llmq.quantize(folder, tmp_path / "a", config, asked, progress=seen.append)
    assert isinstance(seen[0], Writing)
    assert seen[0] == Writing(0, 144, None)
    source = open_source(folder)
    ids = write(source, 6, 24, 4)
    llmq.quantize(folder, tmp_path / "b", config, ids)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert written[0] == written[1]
    assert report.calibration == CalibrationUsed(dataset="self", windows=6, seq_len=24, tokens=144)
    assert any("wrote its 144 calibration tokens itself in" in note and "seed 4" in note for note in report.notes)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}


def test_a_loaded_model_writes_what_its_folder_does(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config, asked = llmq.QuantConfig(group_size=32, method="awq+gptq"), llmq.Calibration("self", 3, 24)
    llmq.quantize(folder, tmp_path / "a", config, asked)
    llmq.quantize(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "b", config, asked)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_an_output_that_is_there_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    def never(step: object) -> None:
        raise AssertionError("it began to write")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(LlmqError, match="out"):
        llmq.quantize(
            folder, tmp_path / "out", llmq.QuantConfig(group_size=32), llmq.Calibration("self"), progress=never
        )


def test_stopped_while_it_writes_it_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def stop(step: object) -> None:
        assert isinstance(step, Writing)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmq.quantize(
            folder, tmp_path / "new" / "out", llmq.QuantConfig(group_size=32), llmq.Calibration("self"), progress=stop
        )
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_tokens_forwards_and_memory(folder: Path) -> None:
    config = llmq.QuantConfig(group_size=32)
    made = llmq.preview(folder, config, llmq.Calibration("self", 40, 24))
    assert "the model writes 960 calibration tokens first" in made.notes[-1]
    assert "69 forwards of up to 16 tokens" in made.notes[-1]  # 3 batches of 23
    many = llmq.preview(folder, config, llmq.Calibration("self", 16, 128))
    assert many.peak >= llmq.preview(folder, config, llmq.Calibration("builtin", 16, 128)).peak
    if "cache" in many.memory:
        assert (
            many.memory["cache"] == 16 * 128 * 4 * 2 * (HIDDEN // 2) * 2
        )  # windows, tokens, layers, k and v, width, bytes
