"""The whole measurement of a model: made or opened, held against the gate, then timed; as one dictionary of JSON values.

    {"bench": "model", what `llmq.bench.record.about` tells, "threads", "source", "dtype", "sizes", "memory",
     "models":   [{"variant", "seconds", "how", "held_bytes", "peak_bytes"}],
     "gate":     [{"model", "linears_worst", "logits_apart", "tokens_compared", ...}],
     "rows":     [{"what", "how", "note", "variant", "batch", "tokens", "tokens_per_second", "ms_per_forward", ...}],
     "missing":  [{"what", "how", "batch", "why"}],
     "overhead": [{"variant", "linear_us", "block_us", "added_to_block_us", ...}],
     "launch":   [{"n", "k", "host_us"}], "seconds": of all of it}

peak_bytes: on a GPU what a form of the model would take alone: what it holds (tensors that it shares with another counted
for both) and the most that a case let it grow by. On a CPU, where the system does not tell one from another, null: the
process's peak stands beside, with all forms in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmq.api import pick_device
from llmq.bench.gate import check, drawn_prompts
from llmq.bench.overhead import launch_overhead, measure_overhead
from llmq.bench.record import about
from llmq.bench.speed import Sizes, measure
from llmq.bench.variants import Variant, held_bytes, of_checkpoint, of_shape
from llmq.config import QuantConfig
from llmq.errors import LlmqError
from llmq.memory import peak_rss_bytes

DENSE_ROWS = 320  # of the gate's linears: beyond what few-rows kernels take
GATE_PROMPT, GATE_NEW = 32, 24


@dataclass(frozen=True)
class Asked:
    """What is measured. original, folder: of a checkpoint; or shape, config: of a random model. seconds: in all.
    overhead, speed: which of the two. seed: of the gate's prompts and rows, and of a random model. self_test: nothing in it
    is a measurement.
    """

    original: Any = None
    folder: str | None = None
    shape: str | None = None
    config: QuantConfig = field(default_factory=lambda: QuantConfig(method="rtn"))
    device: str = "auto"
    dtype: str = "bfloat16"
    sizes: Sizes = field(default_factory=Sizes)
    seconds: float = 300
    seed: int = 0
    speed: bool = True
    overhead: bool = False
    self_test: bool = False

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.shape is None):
            raise LlmqError("either a checkpoint (ORIGINAL PACKED) or --shape must be given, and not both")
        if self.dtype not in ("bfloat16", "float16"):
            raise LlmqError(f"dtype must be bfloat16 or float16, which kernels compute in; got {self.dtype!r}")
        if self.seconds <= 0:
            raise LlmqError(f"seconds must be above 0; got {self.seconds:g}")


def bench(asked: Asked, command: Sequence[str], say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """All that was found. say: is told what is done next. `LlmqError` where the gate fails, before any speed is measured."""
    began = time.perf_counter()
    device = pick_device(asked.device)
    say("making the models" if asked.shape else "opening the models")
    variants = _variants(asked, device)
    say("holding the packed models against the dequantized")
    packed = variants[1:]
    prompts = drawn_prompts(packed[0].model, 2, GATE_PROMPT, GATE_NEW, asked.seed)
    rows = sorted({*asked.sizes.batches, min(asked.sizes.prefill, DENSE_ROWS)})
    gate = [check(variant.name, variant.model, prompts, rows, asked.seed) for variant in packed]
    found: dict[str, Any] = {"rows": [], "missing": [], "overhead": [], "launch": []}
    if asked.overhead:
        say("measuring the overhead")
        found["overhead"] = measure_overhead(variants, _left(began, asked) / (2 if asked.speed else 1))
        found["launch"] = launch_overhead(variants)
    if asked.speed:
        say("measuring the speed")
        found["rows"], found["missing"] = measure(variants, asked.sizes, _left(began, asked))
    return {
        **_circumstances(asked, command, device),
        "models": _models(variants, found["rows"], device),
        "gate": gate,
        **found,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _variants(asked: Asked, device: str) -> list[Variant]:
    if asked.shape:
        return of_shape(asked.shape, asked.config, getattr(torch, asked.dtype), device, asked.seed)
    assert asked.folder is not None
    return of_checkpoint(asked.original, asked.folder, asked.dtype, device)


def _left(began: float, asked: Asked) -> float:
    return max(0.0, asked.seconds - (time.perf_counter() - began))


def _models(variants: Sequence[Variant], rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    told = []
    for variant in variants:
        held = held_bytes(variant.model)
        grown = [
            row["grown_bytes"] for row in rows if row["variant"] == variant.name and row["grown_bytes"] is not None
        ]
        told.append(
            {
                "variant": variant.name,
                "seconds": round(variant.seconds, 3),
                "how": variant.how,
                "held_bytes": held,
                "peak_bytes": held + max(grown) if grown else None,
            }
        )
    return told


def _circumstances(asked: Asked, command: Sequence[str], device: str) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    source = f"shape {asked.shape}: random weights, rounded to nearest" if asked.shape else Path(str(asked.folder)).name
    return {
        "bench": "model",
        **about(torch.device(device), command, asked.seed, asked.self_test),
        "threads": torch.get_num_threads(),
        "source": source,
        "dtype": asked.dtype,
        "quantized": asked.config.to_dict() if asked.shape else None,
        "sizes": asdict(asked.sizes),
        "memory": "peak_bytes: on the device, alone" if on_gpu else "process_peak_bytes: resident, all models together",
        "process_peak_bytes": peak_rss_bytes(),
    }
