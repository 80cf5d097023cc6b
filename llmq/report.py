"""What a quantization run tells about itself: values, and the dictionary that `llmq_report.json` holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmq.config import QuantConfig
from llmq.quantization.rounding import LinearReport
from llmq.transforms.base import PairReport


@dataclass(frozen=True)
class Report:
    """The outcome of one `quantize` call.

    output: the checkpoint folder. source: what was quantized. seconds: wall time after imports.
    peak_rss_bytes: the process's peak resident memory so far; None where the platform does not tell.
    bits_per_weight: stored bits per quantized weight, scales and zero points included.
    checkpoint_bytes: size of the weight files. calibration: dataset, windows, seq_len and tokens; None for none.
    fallbacks: everything that was not done as asked, one line each. layers: one row per quantized linear. pairs: one row
    for each group of linears that the transform looked at.
    """

    output: str
    source: str
    config: QuantConfig
    dtype: str
    seconds: float
    peak_rss_bytes: int | None
    bits_per_weight: float
    checkpoint_bytes: int
    calibration: dict[str, Any] | None
    fallbacks: tuple[str, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    layers: tuple[LinearReport, ...]
    pairs: tuple[PairReport, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The run in one flat dictionary of JSON values, without the layers."""
        config = self.config.to_dict()
        return {
            "output": self.output,
            "source": self.source,
            **{key: config[key] for key in ("method", "bits", "group_size", "symmetric", "scales", "ignore")},
            "dtype": self.dtype,
            "seconds": round(self.seconds, 2),
            "peak_rss_bytes": self.peak_rss_bytes,
            "linears": len(self.layers),
            "bits_per_weight": round(self.bits_per_weight, 4),
            "checkpoint_bytes": self.checkpoint_bytes,
            "calibration": self.calibration,
            "fallbacks": list(self.fallbacks),
            "notes": list(self.notes),
            **(
                {"pairs": len(self.pairs), "pairs_scaled": sum(row.note is None for row in self.pairs)}
                if self.pairs
                else {}
            ),
        }

    def to_dict(self) -> dict[str, Any]:
        """`summary` with the configuration, the versions and every layer: what `llmq_report.json` holds."""
        return {
            **self.summary(),
            "config": self.config.to_dict(),
            "versions": self.versions,
            "layers": [asdict(row) for row in self.layers],
            "pairs": [asdict(row) for row in self.pairs],
        }
