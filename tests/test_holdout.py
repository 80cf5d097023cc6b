"""The gap between fitted and held-out windows: measured where tokens are few, told by width, never in the weights' way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llmq
from llmq.blocks.statistics import SecondMoment
from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight
from llmq.methods.base import Target
from llmq.methods.gptq import gptq
from llmq.quantization import holdout
from llmq.quantization.holdout import Holdout, few_tokens_notes
from tests.tiny import VOCAB, tiny_model

K, N = 64, 24
CPU = torch.device("cpu")
TARGET = Target(Grid(4, 32, True), torch.bfloat16, "search", 0.01)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: torch.Tensor, hessian: torch.Tensor) -> QuantizedWeight:
    return gptq(weight, hessian, TARGET).weight


def error(weight: torch.Tensor, codes: QuantizedWeight, x: torch.Tensor) -> float:
    lost = (weight - codes.dequantize(torch.float32)) @ x.T
    return float(lost.square().sum() / (weight @ x.T).square().sum())


@pytest.mark.parametrize(
    ("windows", "length", "batch", "held"),
    [(8, 12, 3, 24), (5, 12, 2, 12), (3, 16, 3, 16), (2, 16, 1, 16), (1, 40, 1, 10)],
)
def test_the_gap_is_that_of_whole_windows_left_out(windows: int, length: int, batch: int, held: int) -> None:
    x = drawn(windows, length, K) * torch.linspace(0.1, 3, K)
    weight = drawn(N, K, seed=1)
    all_, kept = SecondMoment(K, CPU), Holdout(K, windows * length, length, CPU)
    for part in x.split(batch):
        all_.add(part)
        kept.add(part)
    found = kept.gap("it", weight, all_.value("it"), windows * length, rounded)
    tokens = x.reshape(-1, K)
    fit, other = tokens[:-held], tokens[-held:]
    codes = rounded(weight, fit.T @ fit / len(fit))
    assert found == pytest.approx(error(weight, codes, other) / error(weight, codes, fit), rel=0.02)
    assert found > 1.05


def test_it_can_be_asked_for_more_than_one_weight_and_takes_some_rows() -> None:
    x, weight = drawn(4, 30, K), drawn(4 * holdout.ROWS, K, seed=1)
    kept, moment = Holdout(K, 120, 30, CPU), SecondMoment(K, CPU)
    kept.add(x)
    moment.add(x)
    hessian = moment.value("it")
    some = kept.gap("it", weight[::4], hessian, 120, rounded)
    assert kept.gap("it", weight, hessian, 120, rounded) == some


def test_enough_tokens_are_not_measured() -> None:
    count = holdout.ENOUGH * K
    for tokens, measured in ((count, False), (count - 1, True)):
        kept = Holdout(K, tokens, 64, CPU)
        kept.add(drawn(tokens, K))
        assert (kept._moment is not None) == measured
        assert (kept.gap("it", drawn(N, K), torch.eye(K), tokens, rounded) is not None) == measured


def test_a_single_token_and_tokens_that_never_come_leave_nothing_to_measure() -> None:
    assert Holdout(K, 1, 1, CPU).gap("it", drawn(N, K), torch.eye(K), 1, rounded) is None
    kept = Holdout(K, 100, 10, CPU)
    kept.add(drawn(30, K))  # such as a linear that few tokens reach
    assert kept.gap("it", drawn(N, K), torch.eye(K), 30, rounded) is None


def test_inputs_that_only_held_out_tokens_have_are_no_trouble() -> None:
    x = drawn(4, 32, K)
    x[:3, :, :5] = 0
    kept, moment = Holdout(K, 128, 32, CPU), SecondMoment(K, CPU)
    kept.add(x)
    moment.add(x)
    found = kept.gap("it", drawn(N, K, seed=1), moment.value("it"), 128, rounded)
    assert found is not None
    assert found > 1


def test_one_line_for_each_width_with_the_remedy() -> None:
    told = few_tokens_notes(
        [(64, 90, 1.9), (64, 90, 2.1), (128, 90, 4.0), (32, 90, holdout.TOLD - 0.01), (96, 90, None)]
    )
    assert told == (
        "90 calibration tokens are few for layers of 64 inputs (1.4 per input): their error is 2.00 times as large on held-out "
        "windows as on those fitted; give more (--num-samples)",
        "90 calibration tokens are few for layers of 128 inputs (0.7 per input): their error is 4.00 times as large on held-out "
        "windows as on those fitted; give more (--num-samples)",
    )
    assert few_tokens_notes([]) == ()


def ids(windows: int, length: int = 32) -> torch.Tensor:
    return torch.randint(3, VOCAB, (windows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("windows", [1, 3])
def test_measuring_changes_no_byte(method: str, windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = llmq.QuantConfig(method, group_size=32), tiny_model("llama", layers=2)
    reports = []
    for name, enough in (("with", holdout.ENOUGH), ("without", 0)):
        monkeypatch.setattr(holdout, "ENOUGH", enough)
        reports.append(llmq.quantize(model, tmp_path / name, config, ids(windows)))
    with_, without = reports
    assert all(row.gap is not None for row in with_.layers)
    assert all(row.gap is None for row in without.layers)
    assert [row.error for row in with_.layers] == [row.error for row in without.layers]
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")}) == 1


def test_few_tokens_are_told_by_width_and_many_are_not(tmp_path: Path) -> None:
    config, model = llmq.QuantConfig(group_size=32), tiny_model("llama", layers=2)
    report = llmq.quantize(model, tmp_path / "few", config, ids(3))
    lines = [note for note in report.notes if "are few for layers" in note]
    assert [line.split(" layers of ")[1].split(" inputs")[0] for line in lines] == ["64", "128"]
    assert all(line.startswith("96 calibration tokens") for line in lines)
    told = json.loads((tmp_path / "few" / "llmq_report.json").read_text())
    assert set(lines) <= set(told["notes"])
    assert all(row["gap"] > 1 for row in told["layers"])
    report = llmq.quantize(model, tmp_path / "many", config, ids(64))  # 2048 tokens: 32 and 16 per input
    assert all(row.gap is None for row in report.layers)
    assert not any("are few for layers" in note for note in report.notes)


def test_a_gap_that_cannot_be_measured_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> float:
        raise llmq.LlmqError("the Hessian cannot be factored")

    monkeypatch.setattr(holdout.Holdout, "gap", refuse)
    report = llmq.quantize(tiny_model("llama", layers=1), tmp_path / "out", llmq.QuantConfig(group_size=32), ids(3))
    assert all(row.gap is None for row in report.layers)
    expected = "its gap to held-out windows cannot be measured: the Hessian cannot be factored"
    assert all(expected in row.notes for row in report.layers)
