"""The gap between fitted and held-out windows: measured where tokens are few, reported by width; weights stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llmq
from llmq.blocks.statistics import Statistics, held_out_start, observe
from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight
from llmq.methods.base import Target
from llmq.methods.gptq import gptq
from llmq.quantization import holdout, rounding
from llmq.quantization.holdout import few_tokens_notes, holdout_ratio, is_undersampled, without_held_out
from tests.tiny import VOCAB, tiny_model

K, N = 64, 24
TARGET = Target(Grid(4, 32, True), torch.bfloat16, "search", 0.01)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(weight: torch.Tensor, codes: QuantizedWeight, x: torch.Tensor) -> float:
    lost = (weight - codes.dequantize(torch.float32)) @ x.T
    return float(lost.square().sum() / (weight @ x.T).square().sum())


def split(windows: int, length: int, batch: int) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]], int]:
    """Inputs [windows, length, K] of uneven energies, in batches, and the first held-out token."""
    x = drawn(windows, length, K) * torch.linspace(0.1, 3, K)
    parts = x.split(batch)
    return x, [(0, part) for part in parts], held_out_start(parts)


@pytest.mark.parametrize(
    ("windows", "length", "batch", "held_out"),
    [(8, 12, 3, 24), (5, 12, 2, 12), (3, 16, 3, 16), (2, 16, 1, 16), (1, 40, 1, 10)],
)
def test_the_ratio_is_that_of_whole_windows_left_out(windows: int, length: int, batch: int, held_out: int) -> None:
    x, parts, start = split(windows, length, batch)
    weight = drawn(N, K, seed=1)
    fitted = without_held_out(observe(parts, "it", start))
    assert fitted is not None
    found = holdout_ratio(weight, fitted, TARGET, gptq)
    tokens = x.reshape(-1, K)
    seen, unseen = tokens[:-held_out], tokens[-held_out:]
    codes = gptq(weight, Statistics(seen.T @ seen / len(seen), len(seen)), TARGET).weight
    assert found == pytest.approx(error(weight, codes, unseen) / error(weight, codes, seen), rel=0.02)
    assert found > 1.05


def test_a_single_token_and_windows_without_a_held_out_one_leave_nothing_to_measure() -> None:
    one = observe([(0, drawn(1, 1, K))], "it", held_out_start([drawn(1, 1, K)]))
    assert without_held_out(one) is None
    assert without_held_out(observe([(0, drawn(30, K))], "it", 75)) is None


def test_inputs_that_only_held_out_tokens_have_are_no_trouble() -> None:
    x = drawn(4, 32, K)
    x[:3, :, :5] = 0
    fitted = without_held_out(observe([(0, x)], "it", 96))
    assert fitted is not None
    found = holdout_ratio(drawn(N, K, seed=1), fitted, TARGET, gptq)
    assert found is not None
    assert found > 1


def test_undersampled_is_fewer_than_sixteen_tokens_per_input() -> None:
    count = holdout.MIN_TOKENS_PER_INPUT * K
    assert is_undersampled(count - 1, K)
    assert not is_undersampled(count, K)


def test_one_line_for_each_width_with_the_remedy() -> None:
    notes = few_tokens_notes(
        [(64, 90, 1.9), (64, 90, 2.1), (128, 90, 4.0), (32, 90, holdout.REPORT_FROM - 0.01), (96, 90, None)]
    )
    assert notes == (
        "layers with 64 inputs saw only 90 calibration tokens (1.4 per input); their held-out error is 2.00x the fitted error; "
        "raise --num-samples",
        "layers with 128 inputs saw only 90 calibration tokens (0.7 per input); their held-out error is 4.00x the fitted error; "
        "raise --num-samples",
    )
    assert few_tokens_notes([]) == ()


def ids(windows: int, length: int = 32) -> torch.Tensor:
    return torch.randint(3, VOCAB, (windows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("windows", [1, 3])
def test_measuring_changes_no_byte(method: str, windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = llmq.QuantConfig(method, group_size=32), tiny_model("llama", layers=2)
    reports = []
    for name, least in (("with", holdout.MIN_TOKENS_PER_INPUT), ("without", 0)):
        monkeypatch.setattr(holdout, "MIN_TOKENS_PER_INPUT", least)
        reports.append(llmq.quantize(model, tmp_path / name, config, ids(windows)))
    with_, without = reports
    assert all(row.holdout_ratio is not None for row in with_.layers)
    assert all(row.holdout_ratio is None for row in without.layers)
    assert [row.error for row in with_.layers] == [row.error for row in without.layers]
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")}) == 1


def test_few_tokens_are_noted_by_width_and_many_are_not(tmp_path: Path) -> None:
    config, model = llmq.QuantConfig(group_size=32), tiny_model("llama", layers=2)
    report = llmq.quantize(model, tmp_path / "few", config, ids(3))
    lines = [note for note in report.notes if "calibration tokens" in note and "saw only" in note]
    assert [line.split("layers with ")[1].split(" inputs")[0] for line in lines] == ["64", "128"]
    assert all("saw only 96 calibration tokens" in line for line in lines)
    report = json.loads((tmp_path / "few" / "llmq_report.json").read_text())
    assert set(lines) <= set(report["notes"])
    assert all(row["holdout_ratio"] > 1 for row in report["layers"])
    report = llmq.quantize(model, tmp_path / "many", config, ids(64))  # 2048 tokens: 32 and 16 per input
    assert all(row.holdout_ratio is None for row in report.layers)
    assert not any("saw only" in note for note in report.notes)


def test_a_ratio_that_cannot_be_measured_is_a_note_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> float:
        raise llmq.LlmqError("the Hessian cannot be factored")

    monkeypatch.setattr(rounding, "holdout_ratio", refuse)
    report = llmq.quantize(tiny_model("llama", layers=1), tmp_path / "out", llmq.QuantConfig(group_size=32), ids(3))
    assert all(row.holdout_ratio is None for row in report.layers)
    expected = "its held-out error cannot be measured: the Hessian cannot be factored"
    assert all(expected in row.notes for row in report.layers)
