"""The whole benchmark of a model: make or open it, check its correctness, time it; the result as one dictionary of JSON values.

    {"bench": "model", the keys of `llmq.bench.record.about`, "threads", "source", "dtype", "sizes", "memory",
     "models":      [{"variant", "seconds", "how", "resident_bytes", "peak_bytes"}],
     "correctness": [{"model", "linears_worst", "logits_distance", "tokens_compared", ...}],
     "rows":        [{"what", "how", "note", "variant", "batch", "tokens", "tokens_per_second", "ms_per_forward", ...}],
     "missing":     [{"what", "how", "batch", "why"}],
     "overhead":    [{"variant", "linear_us", "block_us", "added_to_block_us", ...}],
     "launch":      [{"n", "k", "host_us"}], "seconds": of everything}

peak_bytes on a GPU: what a form of the model would take alone, that is its tensors (those shared with another form counted
for both) plus the largest growth in any case. On a CPU the system does not separate the forms, so it is null, and
process_peak_bytes has the peak of the process with all forms in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmq.api import pick_device
from llmq.bench.correctness import check_model, drawn_prompts
from llmq.bench.overhead import launch_overhead, measure_overhead
from llmq.bench.record import about
from llmq.bench.speed import Sizes, measure_speed
from llmq.bench.variants import Variant, of_checkpoint, of_shape, resident_bytes
from llmq.config import QuantConfig
from llmq.errors import LlmqError
from llmq.memory import peak_rss_bytes

DENSE_ROWS = 320  # beyond the limit of the few-rows kernels
CHECK_PROMPT, CHECK_NEW = 32, 24  # tokens


@dataclass(frozen=True)
class BenchConfig:
    """What to measure: a checkpoint (original and folder) or a random model (shape and config)."""

    original: Any = None
    """The original model: any argument of `open_model`."""
    folder: str | None = None
    """The checkpoint that llmq made of it."""
    shape: str | None = None
    """A name of `llmq.bench.random_models.SHAPES`."""
    config: QuantConfig = field(default_factory=lambda: QuantConfig(method="rtn"))
    """How a random model is quantized."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "bfloat16"
    """Of activations: bfloat16 or float16."""
    sizes: Sizes = field(default_factory=Sizes)
    """Batches and tokens."""
    seconds: float = 300
    """The time box for everything."""
    seed: int = 0
    """Of the prompts and rows of the correctness checks, and of a random model."""
    speed: bool = True
    """Measure tokens per second."""
    overhead: bool = False
    """Measure host time."""
    self_test: bool = False
    """Mark the record: nothing in it is a measurement."""

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.shape is None):
            raise LlmqError("give either a checkpoint (ORIGINAL PACKED) or --shape, not both")
        if self.dtype not in ("bfloat16", "float16"):
            raise LlmqError(f"dtype must be bfloat16 or float16, the dtypes of the kernels; got {self.dtype!r}")
        if self.seconds <= 0:
            raise LlmqError(f"seconds must be above 0; got {self.seconds:g}")


def bench(
    config: BenchConfig, command: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run the benchmark; the result as in the module docstring.

    command: for the record. say: called with a line of text before each stage. Raises `LlmqError` if a correctness check
    fails, before any speed is measured.
    """
    began = time.perf_counter()
    device = pick_device(config.device)
    say("making the models" if config.shape else "opening the models")
    variants = _variants(config, device)
    say("checking packed models against dequantized weights")
    packed = variants[1:]
    prompts = drawn_prompts(packed[0].model, 2, CHECK_PROMPT, CHECK_NEW, config.seed)
    rows = sorted({*config.sizes.batches, min(config.sizes.prefill, DENSE_ROWS)})
    checks = [check_model(variant.name, variant.model, prompts, rows, config.seed) for variant in packed]
    results: dict[str, Any] = {"rows": [], "missing": [], "overhead": [], "launch": []}
    if config.overhead:
        say("measuring the overhead")
        results["overhead"] = measure_overhead(variants, _left(began, config) / (2 if config.speed else 1))
        results["launch"] = launch_overhead(variants)
    if config.speed:
        say("measuring the speed")
        results["rows"], results["missing"] = measure_speed(variants, config.sizes, _left(began, config))
    return {
        **_circumstances(config, command, device),
        "models": _models(variants, results["rows"], device),
        "correctness": checks,
        **results,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _variants(config: BenchConfig, device: str) -> list[Variant]:
    if config.shape:
        return of_shape(config.shape, config.config, getattr(torch, config.dtype), device, config.seed)
    assert config.folder is not None
    return of_checkpoint(config.original, config.folder, config.dtype, device)


def _left(began: float, config: BenchConfig) -> float:
    return max(0.0, config.seconds - (time.perf_counter() - began))


def _models(variants: Sequence[Variant], rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    models = []
    for variant in variants:
        resident = resident_bytes(variant.model)
        grown = [
            row["grown_bytes"] for row in rows if row["variant"] == variant.name and row["grown_bytes"] is not None
        ]
        models.append(
            {
                "variant": variant.name,
                "seconds": round(variant.seconds, 3),
                "how": variant.how,
                "resident_bytes": resident,
                "peak_bytes": resident + max(grown) if grown else None,
            }
        )
    return models


def _circumstances(config: BenchConfig, command: Sequence[str], device: str) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    source = (
        f"shape {config.shape}: random weights, rounded to nearest" if config.shape else Path(str(config.folder)).name
    )
    return {
        "bench": "model",
        **about(torch.device(device), command, config.seed, config.self_test),
        "threads": torch.get_num_threads(),
        "source": source,
        "dtype": config.dtype,
        "quantized": config.config.to_dict() if config.shape else None,
        "sizes": asdict(config.sizes),
        "memory": "peak_bytes: on the device, alone" if on_gpu else "process_peak_bytes: resident, all models together",
        "process_peak_bytes": peak_rss_bytes(),
    }
