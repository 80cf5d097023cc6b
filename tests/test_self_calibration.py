"""Self-generated calibration text: from the model's own distribution, in full windows, reproducible, without side effects."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import llmq
from llmq.calibration import GenerationProgress, read_dataset
from llmq.errors import LlmqError
from llmq.hf import self_calibration
from llmq.hf.self_calibration import generate_windows, text_start
from llmq.hf.source import open_source
from llmq.report import CalibrationUsed
from tests.tiny import ARCHITECTURES, HIDDEN, VOCAB, tiny_model

BOS, EOS = 1, 2


class Words:
    """As much of a tokenizer as is needed: its size and its special tokens."""

    def __init__(self, bos: int | None = BOS, words: int = VOCAB) -> None:
        self.bos_token_id, self.eos_token_id, self.all_special_ids, self._words = bos, EOS, [0, 1, 2], words

    def __len__(self) -> int:
        return self._words


def opened(model: Any, tokenizer: Any = None) -> Any:
    return open_source(model, dtype="float32", tokenizer=tokenizer or Words())


def generate(source: Any, count: int, length: int, seed: int = 0, **options: Any) -> torch.Tensor:
    return generate_windows(source, text_start(source), count, length, seed, **options)


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
def reference_text(model: Any, draws: torch.Tensor, firsts: list[int], ends: set[int]) -> list[list[int]]:
    """The same text, generated without a cache, one window and one token at a time."""
    windows = []
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
        windows.append(ids)
    return windows


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_follow_the_models_own_distribution(arch: str) -> None:
    """With sliding windows, position embeddings and ALiBi, too: the text with a cache equals that of plain forwards."""
    model = tiny_model(arch, layers=2)
    draws = torch.rand(2, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert generate(opened(model), 2, 20, 3).tolist() == reference_text(model, draws, [BOS], {EOS})


def test_without_a_bos_texts_begin_with_any_token_that_is_not_special() -> None:
    model = tiny_model("llama", layers=1)
    source = opened(model, Words(bos=None, words=100))
    start = text_start(source)
    assert start.tokens.tolist() == list(range(3, 100))
    draws = torch.rand(18, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    windows = generate(source, 18, 30)
    assert windows.tolist() == reference_text(model, draws, start.tokens.tolist(), {EOS})
    assert len(set(windows[:, 0].tolist())) > 10


def test_windows_are_full_and_a_new_text_follows_each_end() -> None:
    windows = generate(opened(tiny_model("llama", layers=1)), 20, 100)
    assert windows.shape == (20, 100)
    assert windows.dtype == torch.int64
    assert 0 <= int(windows.min()) <= int(windows.max()) < VOCAB
    assert set(windows[:, 0].tolist()) == {BOS}
    ended = windows[:, :-1] == EOS
    assert int(ended.sum()) > 5
    assert set(windows[:, 1:][ended].tolist()) == {BOS}


def test_the_same_seed_gives_the_same_text_however_many_windows_follow() -> None:
    source = opened(tiny_model("llama"))
    few, many = generate(source, 3, 24, 5), generate(source, self_calibration.ROWS + 2, 24, 5)
    assert torch.equal(few, many[:3])
    assert torch.equal(many, generate(source, self_calibration.ROWS + 2, 24, 5))
    assert not torch.equal(few, generate(source, 3, 24, 6))
    assert len({tuple(row) for row in many.tolist()}) == len(many)


@pytest.mark.parametrize("length", [1, 2, self_calibration.WARMUP_STEPS + 2])
def test_the_shortest_windows(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_calibration, "REPORT_EVERY", 0.0)
    count = self_calibration.ROWS * (self_calibration.MIN_TIMED_STEPS + 2)  # as many batches as an estimate takes steps
    assert generate(opened(tiny_model("llama", layers=1)), count, length).shape == (count, length)


def test_the_callers_model_is_not_changed_and_its_settings_do_not_change_the_text(tmp_path: Path) -> None:
    plain, model = tiny_model("llama"), tiny_model("llama").train()
    odd = {"repetition_penalty": 9.0, "top_k": 1, "do_sample": True, "max_length": 3, "suppress_tokens": [5, 6]}
    for name, value in odd.items():
        setattr(model.generation_config, name, value)
    settings = model.generation_config.to_dict()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    source = opened(model)
    assert torch.equal(generate(source, 2, 16), generate(opened(plain), 2, 16))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.to_dict() == settings == source.model.generation_config.to_dict()


def test_a_streamed_model_is_loaded_whole_only_while_it_generates(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(folder, dtype="float32")

    def loaded() -> list[bool]:
        return [not p.is_meta for i in range(len(source)) for p in source._blocks[i].parameters()]

    def stop(done: int, total: int, left: float | None) -> None:
        if done:
            assert all(loaded())
            raise KeyboardInterrupt

    monkeypatch.setattr(self_calibration, "REPORT_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        generate(source, 2, 16, progress=stop)
    assert not any(loaded())
    assert torch.equal(generate(source, 2, 16), generate(opened(tiny_model("llama")), 2, 16))
    assert not any(loaded())


def test_progress_is_reported_before_the_first_token_and_with_an_estimate_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_calibration, "REPORT_EVERY", 0.0)
    reports: list[tuple[int, int, float | None]] = []
    count, length = self_calibration.ROWS + 2, 32
    generate(opened(tiny_model("llama", layers=1)), count, length, progress=lambda *each: reports.append(each))
    assert reports[0] == (0, count * length, None)
    done = [each[0] for each in reports]
    assert done == sorted(done)
    assert done[-1] == count * length
    left = [each[2] for each in reports if each[2] is not None]
    assert len(left) == len(reports) - self_calibration.MIN_TIMED_STEPS - self_calibration.WARMUP_STEPS
    assert min(left) >= 0
    assert left[-1] == 0


def test_the_estimate_extrapolates_steps_that_take_longer_and_longer() -> None:
    clock = self_calibration._Clock(40, 100, lambda *progress: None)
    clock.begin(16)
    clock._times = [(n, 1 + n / 10) for n in range(5, 20)]
    clock._tokens = 20
    first = sum(1 + n / 10 for n in range(20, 100))
    whole = sum(1 + n / 10 for n in range(100))
    assert clock._left() == pytest.approx(first + 2 * whole, rel=1e-3)


def test_a_model_whose_logits_overflow_is_refused() -> None:
    model = tiny_model("llama", layers=1)
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(LlmqError, match="needs finite logits; the model's are NaN or inf"):
        generate(opened(model), 1, 8)


@pytest.mark.parametrize("tokenizer", [Words(bos=VOCAB), Words(bos=None, words=3)], ids=["foreign bos", "no words"])
def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer: Words) -> None:
    with pytest.raises(LlmqError, match="must begin texts with one of the model's 128 tokens"):
        text_start(opened(tiny_model("llama", layers=1), tokenizer))


def test_a_source_without_a_tokenizer_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    config, calibration = llmq.QuantConfig(group_size=32), llmq.Calibration("self", 2, 16)
    with pytest.raises(
        LlmqError, match="dataset self needs the model's tokenizer.*does not say where its tokenizer is"
    ):
        llmq.quantize(model, tmp_path / "deep" / "out", config, calibration)
    with pytest.raises(LlmqError, match="dataset self needs the model's tokenizer"):
        llmq.preview(model, config, calibration)
    assert list(tmp_path.iterdir()) == []


def test_dataset_self_cannot_be_evaluated_on() -> None:
    with pytest.raises(LlmqError, match="choose a text to evaluate on"):
        read_dataset("self", "evaluation")


def test_quantizing_with_dataset_self_equals_quantizing_with_its_tokens(folder: Path, tmp_path: Path) -> None:
    config, calibration = llmq.QuantConfig(group_size=32), llmq.Calibration("self", 6, 24, seed=4)
    seen: list[Any] = []
    report = llmq.quantize(folder, tmp_path / "a", config, calibration, progress=seen.append)
    assert isinstance(seen[0], GenerationProgress)
    assert seen[0] == GenerationProgress(0, 144, None)
    source = open_source(folder)
    ids = generate(source, 6, 24, 4)
    llmq.quantize(folder, tmp_path / "b", config, ids)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert written[0] == written[1]
    assert report.calibration == CalibrationUsed(dataset="self", windows=6, seq_len=24, tokens=144)
    assert any("generated its 144 calibration tokens in" in note and "seed 4" in note for note in report.notes)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}


def test_a_loaded_model_generates_what_its_folder_does(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config, calibration = llmq.QuantConfig(group_size=32, method="awq+gptq"), llmq.Calibration("self", 3, 24)
    llmq.quantize(folder, tmp_path / "a", config, calibration)
    llmq.quantize(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "b", config, calibration)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_an_existing_output_is_refused_before_anything_is_generated(folder: Path, tmp_path: Path) -> None:
    def never(step: object) -> None:
        raise AssertionError("it began to generate")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(LlmqError, match="out"):
        llmq.quantize(
            folder, tmp_path / "out", llmq.QuantConfig(group_size=32), llmq.Calibration("self"), progress=never
        )


def test_a_run_that_is_stopped_while_it_generates_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def stop(step: object) -> None:
        assert isinstance(step, GenerationProgress)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmq.quantize(
            folder, tmp_path / "new" / "out", llmq.QuantConfig(group_size=32), llmq.Calibration("self"), progress=stop
        )
    assert list(tmp_path.iterdir()) == []


def test_a_preview_states_tokens_forwards_and_memory(folder: Path) -> None:
    config = llmq.QuantConfig(group_size=32)
    made = llmq.preview(folder, config, llmq.Calibration("self", 40, 24))
    assert "the model writes 960 calibration tokens first" in made.notes[-1]
    assert "69 forwards of up to 16 tokens" in made.notes[-1]  # 3 batches of 23
    many = llmq.preview(folder, config, llmq.Calibration("self", 16, 128))
    assert many.peak >= llmq.preview(folder, config, llmq.Calibration("builtin", 16, 128)).peak


def test_the_predicted_peak_is_that_of_generating_if_that_is_higher(folder: Path, tmp_path: Path) -> None:
    tiny_model("llama", layers=64).save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    memory = llmq.preview(tmp_path, llmq.QuantConfig(group_size=32), llmq.Calibration("self", 16, 16)).memory
    assert set(memory) == {"process", "model", "cache", "logits"}
    assert memory["cache"] == 16 * 16 * 64 * 2 * (HIDDEN // 2) * 2  # windows, tokens, layers, k and v, width, bytes
