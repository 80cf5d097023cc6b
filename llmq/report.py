"""The record of one quantization run: values, the JSON that `llmq_report.json` holds, and its reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from llmq.checkpoint.target import REPORT
from llmq.config import QuantConfig
from llmq.errors import LlmqError
from llmq.quantization.rounding import LinearReport
from llmq.transforms.base import PairReport

SCHEMA = 1
"""Version of the JSON's layout; raised by every change that an older reader would misunderstand."""

Row = TypeVar("Row")


@dataclass(frozen=True)
class CalibrationUsed:
    """The calibration data of a run.

    Fields:
        dataset: the dataset's name or path, or "token ids" if the caller passed ids.
        windows: number of windows.
        seq_len: tokens per window.
        tokens: windows * seq_len.
    """

    dataset: str
    windows: int
    seq_len: int
    tokens: int


@dataclass(frozen=True)
class Report:
    """The outcome of one `quantize` call.

    Fields:
        output: the checkpoint folder.
        source: description of the source model.
        config: the configuration.
        dtype: of the source's weights after the initial cast; scales are stored in it.
        seconds: wall time of the call.
        peak_rss_bytes: peak resident memory of the process so far; None if the platform does not report it.
        bits_per_weight: stored bits per quantized weight, scales and zero points included.
        checkpoint_bytes: total size of the tensors in the checkpoint.
        calibration: the calibration data; None for a data-free method.
        fallbacks: what was done differently from the configuration, as "LINEAR: what", one line each.
        notes: other deviations and warnings, one line each.
        versions: of llmq, its dependencies and Python.
        layers: one row per quantized linear.
        pairs: one row per group of linears that the transform considered.
    """

    output: str
    source: str
    config: QuantConfig
    dtype: str
    seconds: float
    peak_rss_bytes: int | None
    bits_per_weight: float
    checkpoint_bytes: int
    calibration: CalibrationUsed | None
    fallbacks: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    layers: tuple[LinearReport, ...]
    pairs: tuple[PairReport, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The run in one flat dictionary of JSON values, without the layers: the line that `llmq quantize` prints."""
        config = self.config.to_dict()
        values = {
            "output": self.output,
            "source": self.source,
            **{key: config[key] for key in ("method", "bits", "group_size", "symmetric", "scales", "ignore")},
            "dtype": self.dtype,
            "seconds": round(self.seconds, 2),
            "peak_rss_bytes": self.peak_rss_bytes,
            "linears": len(self.layers),
            "bits_per_weight": round(self.bits_per_weight, 4),
            "checkpoint_bytes": self.checkpoint_bytes,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "fallbacks": list(self.fallbacks),
            "notes": list(self.notes),
        }
        if self.pairs:
            values |= {"pairs": len(self.pairs), "pairs_scaled": sum(row.note is None for row in self.pairs)}
        return values

    def to_dict(self) -> dict[str, Any]:
        """What `llmq_report.json` holds: `summary` unrounded, with the schema, configuration, versions and all layers."""
        return {
            "schema": SCHEMA,
            **self.summary(),
            "seconds": self.seconds,
            "bits_per_weight": self.bits_per_weight,
            "config": self.config.to_dict(),
            "versions": dict(self.versions),
            "layers": [asdict(row) for row in self.layers],
            "pairs": [asdict(row) for row in self.pairs],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote, before or after a trip through JSON.

        Raises `LlmqError` for another schema, and for missing, unknown or malformed entries.
        """
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if schema != SCHEMA or isinstance(schema, bool):
            raise LlmqError(f"a report must have schema {SCHEMA}; got {schema!r}; read it with the llmq that wrote it")
        try:
            calibration = values["calibration"]
            parts = {
                "config": QuantConfig.from_dict(values["config"]),
                "calibration": None if calibration is None else _row(CalibrationUsed, calibration),
                "fallbacks": tuple(values["fallbacks"]),
                "notes": tuple(values["notes"]),
                "layers": tuple(_row(LinearReport, row) for row in values["layers"]),
                "pairs": tuple(_row(PairReport, row) for row in values["pairs"]),
            }
            return cls(**{field.name: parts.get(field.name, values[field.name]) for field in fields(cls)})
        except (KeyError, TypeError, AttributeError) as error:
            raise LlmqError(f"a report of schema {SCHEMA} is incomplete or malformed: {error!r}") from error


def write_report(folder: Path, report: Report) -> None:
    """Write `llmq_report.json` into a checkpoint folder."""
    (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")


def read_report(folder: str | Path) -> Report:
    """The report in a checkpoint folder. Raises `LlmqError` if there is none that this version can read."""
    file = Path(folder) / REPORT
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LlmqError(f"{file} cannot be read ({error}); pass a folder that llmq quantize wrote") from error
    try:
        return Report.from_dict(values)
    except LlmqError as error:
        raise LlmqError(f"{file}: {error}") from error


def _row(cls: type[Row], values: Mapping[str, Any]) -> Row:
    """A frozen dataclass from JSON values, whose lists stand for tuples."""
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
