"""The contract of every metric in `METRICS`; and that a new row reaches the evaluation, the table and the JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from llmq.cli.console import print_evaluations
from llmq.errors import LlmqError
from llmq.eval import registry
from llmq.eval.base import Column, Metric, ModelMetric, ScoredText, Slab, TextMetric
from llmq.eval.registry import METRICS, select_metrics
from llmq.eval.scoring import score
from llmq.evaluation import Evaluation, evaluate
from tests.fixtures import tiny_tokenizer
from tests.tiny import VOCAB, tiny_model

WINDOW = 24
IDS = torch.randint(3, VOCAB, (5 * WINDOW,), generator=torch.Generator().manual_seed(1))
TEXT_METRICS = tuple(metric for metric in METRICS if isinstance(metric, TextMetric))

every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
every_text_metric = pytest.mark.parametrize("metric", TEXT_METRICS, ids=lambda metric: metric.name)


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    return tiny_model("llama"), tiny_model("llama", seed=1)


def results_of(metric: Metric[Any], models: Sequence[nn.Module], **options: Any) -> list[Any]:
    """One result per model; the first model is the original of all."""
    if isinstance(metric, ModelMetric):
        return list(metric.measure(models))
    assert isinstance(metric, TextMetric)
    settings = {"original": models[0], "window": WINDOW, "tokenizer": tiny_tokenizer(), **options}
    return [score((metric,), model, IDS, **settings)[metric.name] for model in models]


@every_metric
def test_results_are_frozen_and_become_json(metric: Metric[Any], models: tuple[nn.Module, ...]) -> None:
    for result in results_of(metric, models):
        assert dataclasses.is_dataclass(result)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, dataclasses.fields(result)[0].name, None)
        values = result.to_dict()
        assert values
        assert json.loads(json.dumps(values, allow_nan=False)) == values


@every_metric
def test_every_column_has_a_cell_for_the_first_and_for_other_models(
    metric: Metric[Any], models: tuple[nn.Module, ...]
) -> None:
    first, other = results_of(metric, models)
    assert metric.columns
    for column in metric.columns:
        assert column.heading
        assert column.cell(other, first), f"{column.heading} is empty for the second model"
        assert isinstance(column.cell(first, first), str)
    assert all(isinstance(note, str) for note in metric.notes([first, other]))
    json.dumps(metric.comparison(first, other), allow_nan=False)


def test_names_and_json_keys_are_unique(models: tuple[nn.Module, ...]) -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    reserved = [field.name for field in dataclasses.fields(Evaluation) if field.name != "results"]
    keys = list(reserved)
    for metric in METRICS:
        first, other = results_of(metric, models)
        keys += [*other.to_dict(), *metric.comparison(first, other)]
    assert len(set(keys)) == len(keys)


@every_text_metric
def test_text_metrics_give_the_same_result_alone_together_and_again(
    metric: TextMetric[Any], models: tuple[nn.Module, ...]
) -> None:
    settings: dict[str, Any] = {"original": models[0], "window": WINDOW, "tokenizer": tiny_tokenizer()}
    together = score(TEXT_METRICS, models[1], IDS, **settings)[metric.name]
    assert together == results_of(metric, models)[1] == results_of(metric, models)[1]


@every_text_metric
def test_text_metrics_do_not_depend_on_the_batch_size(metric: TextMetric[Any], models: tuple[nn.Module, ...]) -> None:
    alone, batched = (results_of(metric, models, batch_size=size)[1].to_dict() for size in (1, 3))
    numbers = [{key: value for key, value in values.items() if isinstance(value, float)} for values in (alone, batched)]
    assert numbers[0]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert {**alone, **numbers[0]} == {**batched, **numbers[0]}


@every_text_metric
def test_text_metrics_refuse_logits_of_nan(metric: TextMetric[Any]) -> None:
    broken = tiny_model("llama")
    broken.lm_head.weight.data[5] = math.nan
    with pytest.raises(LlmqError, match=r"window 0 \(counted from 0\)"):
        results_of(metric, (tiny_model("llama"), broken))


def test_optional_metrics_are_selected_by_name_only() -> None:
    def names(*arguments: Any) -> list[list[str]]:
        return [[metric.name for metric in metrics] for metrics in select_metrics(*arguments)]

    (text, models), (without_original, _) = names((), True), names((), False)
    assert {"perplexity", "divergence"} <= set(text)
    assert "perplexity" in without_original
    assert "divergence" not in without_original
    assert "speed" not in models
    assert "speed" in names(("speed",), False)[1]
    known = ", ".join(metric.name for metric in METRICS)
    with pytest.raises(LlmqError, match=f"metric must be one of {known}; got 'taste'"):
        select_metrics(("speed", "taste"), True)


@dataclasses.dataclass(frozen=True)
class Entropy:
    nats: float

    def to_dict(self) -> dict[str, Any]:
        return {"test_entropy": self.nats}


def entropy_sums(slab: Slab, original: Slab | None) -> tuple[float]:
    return (float(torch.distributions.Categorical(logits=slab.logits.float()).entropy().sum()),)


def entropy(text: ScoredText, means: Sequence[tuple[float, ...]]) -> Entropy:
    return Entropy(math.fsum(mean for (mean,) in means) / len(means))


ENTROPY = TextMetric(
    name="entropy of the test",
    sums=entropy_sums,
    check=lambda window, means: None,
    summarize=entropy,
    columns=(Column("entropy", lambda result, first: f"{result.nats:.4f}"),),
    comparison=lambda first, other: {"test_entropy_to_first": other.nats - first.nats},
    notes=lambda results: (f"entropy of {len(results)} models",),
)


def test_one_new_row_reaches_the_evaluation_the_table_and_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "METRICS", (*METRICS, ENTROPY))
    sources = []
    for seed in (0, 1):
        model = tiny_model("llama", seed=seed, layers=1)
        model.save_pretrained(tmp_path / f"model-{seed}")
        tiny_tokenizer().save_pretrained(tmp_path / f"model-{seed}")
        sources.append((f"model-{seed}", tmp_path / f"model-{seed}"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in IDS.tolist()))
    evaluations = evaluate(sources, dataset=str(tmp_path / "text.txt"), window=WINDOW)
    with torch.no_grad():
        logits = model(input_ids=IDS.view(-1, WINDOW)).logits[:, :-1]
    expected = float(torch.distributions.Categorical(logits=logits).entropy().mean())
    first, other = (each.to_dict(first=evaluations[0]) for each in evaluations)
    assert other["test_entropy"] == pytest.approx(expected, rel=1e-5)
    assert other["test_entropy_to_first"] == other["test_entropy"] - first["test_entropy"]
    assert "test_entropy_to_first" not in first
    console = Console(file=io.StringIO(), width=140)
    print_evaluations(console, evaluations)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{expected:.4f}" in shown
    assert "note: entropy of 2 models" in shown
