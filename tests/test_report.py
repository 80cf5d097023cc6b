"""`llmq_report.json`: what is read back equals what was written, and other schemas are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import llmq
from llmq.config import METHODS
from llmq.errors import LlmqError
from llmq.report import SCHEMA, CalibrationUsed, Report, read_report
from tests.fixtures import WINDOWS
from tests.tiny import tiny_model


def quantized(folder: Path, method: str) -> Report:
    config = llmq.QuantConfig(method, group_size=32, ignore=("lm_head",))
    calibrated = next(row.calibrated for row in METHODS if row.name == method)
    return llmq.quantize(tiny_model("llama", layers=2), folder, config, WINDOWS if calibrated else None)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "out"
    quantized(folder, "rtn")
    return folder


@pytest.mark.parametrize("method", [row.name for row in METHODS])
def test_a_report_read_back_equals_the_one_written(method: str, tmp_path: Path) -> None:
    report = quantized(tmp_path / "out", method)
    assert read_report(tmp_path / "out") == report
    assert Report.from_dict(report.to_dict()) == report
    assert report.layers
    assert bool(report.pairs) == method.startswith("awq")


def test_calibration_is_a_frozen_value(tmp_path: Path) -> None:
    calibration = quantized(tmp_path / "out", "gptq").calibration
    windows, seq_len = WINDOWS.shape
    assert calibration == CalibrationUsed("token ids", windows, seq_len, windows * seq_len)
    with pytest.raises(dataclasses.FrozenInstanceError):
        calibration.windows = 1  # type: ignore[misc, union-attr]


def test_the_schema_comes_first_and_the_printed_line_has_none(written: Path) -> None:
    values = json.loads((written / "llmq_report.json").read_text())
    assert next(iter(values)) == "schema"
    assert values["schema"] == SCHEMA == 1
    assert "schema" not in read_report(written).summary()


@pytest.mark.parametrize("schema", [0, 2, "1", None, True, "absent"])
def test_other_schemas_are_refused(schema: Any, written: Path, tmp_path: Path) -> None:
    values = json.loads((written / "llmq_report.json").read_text())
    if schema == "absent":
        del values["schema"]
    else:
        values["schema"] = schema
    (tmp_path / "llmq_report.json").write_text(json.dumps(values))
    with pytest.raises(
        LlmqError, match=r"llmq_report\.json: a report must have schema 1; got .*the llmq that wrote it"
    ):
        read_report(tmp_path)


def change(values: dict[str, Any], key: str, new: Any) -> None:
    values[key] = new


BROKEN = {
    "a missing entry": lambda values: values.pop("dtype"),
    "a missing list": lambda values: values.pop("layers"),
    "a row without a field": lambda values: values["layers"][0].pop("name"),
    "a row with an unknown field": lambda values: change(values["layers"][0], "colour", 1),
    "a row that is no object": lambda values: change(values, "layers", [1]),
    "calibration that is no object": lambda values: change(values, "calibration", "builtin"),
    "a list that is null": lambda values: change(values, "notes", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_reports_are_refused(name: str, written: Path) -> None:
    values = json.loads((written / "llmq_report.json").read_text())
    BROKEN[name](values)
    with pytest.raises(LlmqError, match="a report of schema 1 is incomplete or malformed"):
        Report.from_dict(values)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "1"])
def test_files_that_hold_no_report_are_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "llmq_report.json").write_text(content)
    with pytest.raises(LlmqError, match=r"llmq_report\.json"):
        read_report(tmp_path)


def test_unknown_settings_are_refused(written: Path) -> None:
    values = json.loads((written / "llmq_report.json").read_text())
    values["config"]["colour"] = 1
    with pytest.raises(LlmqError, match="colour"):
        Report.from_dict(values)
