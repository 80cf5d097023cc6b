"""Opening any model for inference, and evaluating several on one text."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llmq
from llmq.errors import LlmqError
from llmq.eval.perplexity import perplexity
from llmq.evaluation import Evaluation, evaluate, generate_text
from llmq.hf import inference, sidefiles
from llmq.serving.linear import QuantLinear
from tests.fixtures import checkpoint, float32_checkpoint, tiny_tokenizer
from tests.tiny import VOCAB, tiny_model

WINDOW = 24
IDS = torch.randint(3, VOCAB, (4 * WINDOW,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, a packed one, each with a tokenizer, and a text."""
    made = tmp_path_factory.mktemp("evaluation")
    tiny_model("llama").save_pretrained(made / "plain")
    checkpoint(made / "packed")
    for name in ("plain", "packed"):
        tiny_tokenizer().save_pretrained(made / name)
    (made / "text.txt").write_text(" ".join(f"w{i}" for i in IDS.tolist()))
    return made


def run(folder: Path, *names: str, **options: Any) -> list[Evaluation]:
    settings = {"dataset": str(folder / "text.txt"), "window": WINDOW, **options}
    return evaluate([(name, folder / name) for name in names], **settings)


def test_results_are_those_of_the_opened_models(folder: Path) -> None:
    plain, packed = run(folder, "plain", "packed")
    for each in (plain, packed):
        model, _ = inference.open_model(folder / each.model, "float32")
        expected = perplexity(model, IDS, WINDOW, tokenizer=tiny_tokenizer())
        assert each.results == {"perplexity": expected}
        assert (each.dtype, each.dataset) == ("float32", str(folder / "text.txt"))
        assert each.seconds > 0
    values = packed.to_dict(first=plain)
    keys = {"model", "dataset", "dtype", "seconds", "tokens", "windows", "window", "protocol"}
    keys |= {"perplexity", "stderr", "bits_per_byte"}
    assert set(values) == {*keys, "to_first", "to_first_stderr"}
    assert set(plain.to_dict(first=plain)) == set(plain.to_dict()) == keys
    assert json.loads(json.dumps(values)) == values


def test_an_original_adds_the_metrics_that_compare_with_it(folder: Path) -> None:
    (result,) = run(folder, "packed", original=folder / "plain")
    assert list(result.results) == ["perplexity", "divergence"]
    assert {"kl", "kl_stderr", "top1", "top1_stderr"} <= set(result.to_dict())
    assert result.results["perplexity"] == run(folder, "packed")[0].results["perplexity"]


def test_optional_metrics_run_on_request(folder: Path) -> None:
    results = run(folder, "plain", "packed", metrics=("speed",))
    for each in results:
        assert list(each.results) == ["perplexity", "speed"]
        assert each.to_dict()["speed"]["dtype"] == "bfloat16"
        assert each.dtype == "float32"


def test_results_are_frozen(folder: Path) -> None:
    (result,) = run(folder, "plain", limit=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.seconds = 0.0  # type: ignore[misc]


def test_a_wrong_argument_is_refused_before_a_model_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(inference, "open_model", lambda *args: opened.append(args))
    for options in ({"dataset": "/nowhere.txt"}, {"metrics": ("taste",)}, {"device": "nowhere"}):
        with pytest.raises(LlmqError):
            run(folder, "plain", original=folder / "plain", **options)
    assert not opened


def test_one_model_is_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0
    real = inference.open_model

    def open_model(*args: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        opened = real(*args)
        alive.append(weakref.ref(opened[0]))
        return opened

    monkeypatch.setattr(inference, "open_model", open_model)
    run(folder, "plain", "packed", "plain")
    assert len(alive) == 3
    assert most == 0, "the previous model was still in memory"


def test_progress_names_the_model(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    run(folder, "plain", "packed", batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == [("plain", 3, 4), ("plain", 4, 4), ("packed", 3, 4), ("packed", 4, 4)]


def test_packed_layouts_are_made_on_the_requested_device_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is moved after loading has made all its CPU layouts for nothing. The device is a fake one."""
    placed: list[Any] = []
    moved: list[Any] = []
    ready: list[tuple[str, int]] = []
    real, make = inference.load, QuantLinear.ready

    def load(path: Path, **options: Any) -> Any:
        placed.append(options.pop("device_map", None))
        return real(path, **options)

    def counted(linear: QuantLinear, *args: Any) -> None:
        ready.append((str(placed[-1]), len(moved)))
        make(linear, *args)

    monkeypatch.setattr(inference, "load", load)
    monkeypatch.setattr(QuantLinear, "ready", counted)
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, *args, **kwargs: moved.append(args) or model)
    for device, device_map in (("fake:1", "fake:1"), ("cpu", None)):
        ready.clear()
        inference.open_model(folder / "packed", "bfloat16", device)
        assert ready, "layouts are made by loading"
        assert set(ready) == {(str(device_map), 0)}
    assert placed == ["fake:1", None]
    assert not moved


def test_generated_text_and_its_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = generate_text(folder / "packed", "w3 w4 w5", max_new_tokens=4, raw=True)
    assert result.prompt_tokens == 3
    assert 1 <= result.new_tokens <= 4
    assert result.tokens_per_second == pytest.approx(result.new_tokens / result.seconds)
    assert capsys.readouterr().out.strip() == result.text.strip()
    assert generate_text(folder / "packed", "w3 w4 w5", max_new_tokens=4, raw=True, stream=False).text == result.text
    assert capsys.readouterr().out == ""
    values = result.to_dict()
    assert set(values) == {field.name for field in dataclasses.fields(result)}
    with pytest.raises(LlmqError, match="max_new_tokens must be at least 1; got 0"):
        generate_text(folder / "packed", "w3", max_new_tokens=0)


def test_a_tokenizer_that_cannot_be_loaded_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever transformers raises, also without a message."""

    class Failing:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> None:
            raise KeyError

    monkeypatch.setattr(sidefiles, "AutoTokenizer", Failing)
    with pytest.raises(LlmqError, match=r"packed has no tokenizer that can be loaded \(KeyError\)"):
        inference.open_model(folder / "packed", "bfloat16")


@pytest.mark.parametrize("bos", [False, True])
def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path, bos: bool) -> None:
    from tokenizers import processors

    folder = float32_checkpoint(tmp_path / "q", method="rtn")
    tokenizer = tiny_tokenizer()
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.save_pretrained(folder)
    (tmp_path / "t.txt").write_text(" ".join(f"w{3 + i * 7 % 120}" for i in range(400)))
    found = evaluate([("q", str(folder))], dataset=str(tmp_path / "t.txt"), window=64)[0].results["perplexity"]
    assert ("BOS" in found.protocol) == bos
    assert found.windows == 6
    ids = torch.tensor([3 + i * 7 % 120 for i in range(400)])
    size = 63 if bos else 64
    first = ids[: 6 * size].view(6, size)
    model = llmq.load(folder)
    windows = torch.cat((torch.ones(6, 1, dtype=torch.int64), first), 1) if bos else first
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert found.value == pytest.approx(float(loss.exp()), rel=1e-4)
