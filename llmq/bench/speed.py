"""Tokens per second of several forms of one model, in turns: prefill, and decode at several batch sizes.

    prefill        one forward over `prefill` tokens, which makes its cache
    decode eager   forwards of one token each with the model's own cache, as `generate` runs them
    decode fast    steps of `llmq.hf.generation.Decoder`: a replayed CUDA graph if possible, else the same step eagerly

Prompts are random ids (speed does not depend on them) and are processed before the clock starts. The clock stops when the
device is done. Results are medians. The memory of a case is the growth of the device's allocated memory in its first,
uncounted run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmq.bench.turns import in_turns
from llmq.bench.variants import Variant
from llmq.errors import LlmqError
from llmq.eval.latency import once
from llmq.eval.models import context_length, input_device, random_ids, wait
from llmq.hf.generation import Decoder


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure. Raises `LlmqError` for one below 1."""

    batches: tuple[int, ...] = (1, 8, 32)
    """Sequences decoded at a time."""
    prefill: int = 2048
    """Tokens of the timed prompt."""
    prompt: int = 128
    """Tokens before the decoded ones."""
    new: int = 32
    """Tokens decoded in one run."""
    rounds: int = 15
    """The most runs of each case."""

    def __post_init__(self) -> None:
        if not self.batches:
            raise LlmqError("batches must have at least one number of sequences; got none")
        single = {name: getattr(self, name) for name in ("prefill", "prompt", "new", "rounds")}
        for name, value in {**single, "batches": min(self.batches)}.items():
            if value < 1:
                raise LlmqError(f"{name} must be at least 1; got {value}")


@dataclass
class SpeedCase:
    """One form of a model and one workload. A call runs it once and returns the seconds to count."""

    variant: Variant
    """The form of the model."""
    what: str
    """prefill or decode."""
    how: str
    """prefill, eager or fast."""
    batch: int
    """Sequences."""
    tokens: int
    """Tokens prefilled or decoded in one run."""
    prompt: int
    """Tokens before the decoded ones."""
    grown: int | None = None
    """Growth of the device's allocated memory in the first run, in bytes; None on a CPU."""
    note: str | None = None
    """How a fast case ran."""
    _decoder: Decoder | None = field(default=None, repr=False)

    @torch.inference_mode()
    def __call__(self) -> float:
        device = input_device(self.variant.model)
        on_gpu = device.type == "cuda"
        if on_gpu and self.grown is None:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        seconds = self._fast() if self.how == "fast" else self._eager()
        if on_gpu and self.grown is None:
            self.grown = torch.cuda.max_memory_allocated(device) - before
        return seconds

    def _eager(self) -> float:
        model = self.variant.model
        if self.how == "prefill":
            return once(model, random_ids(model, self.batch, self.tokens), 0)[0]
        return once(model, random_ids(model, self.batch, self.prompt), self.tokens)[1]

    def _fast(self) -> float:
        if self._decoder is None:
            self._decoder = Decoder(self.variant.model, self.batch, self.prompt + self.tokens + 1)
        decoder = self._decoder
        decoder.prefill(random_ids(self.variant.model, self.batch, self.prompt))
        self.note = "CUDA graph" if decoder.graph is not None else f"eager: {decoder.eager_because}"
        wait(decoder.device)
        began = time.perf_counter()
        for _ in range(self.tokens):
            decoder.step()
        wait(decoder.device)
        return time.perf_counter() - began


def measure_speed(
    variants: Sequence[Variant], sizes: Sizes, seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of the measured cases, rows of the others with the reason), within `seconds` in total."""
    groups, missing = [], []
    for what, how, batch, tokens in planned(variants, sizes):
        group = [SpeedCase(variant, what, how, batch, tokens, sizes.prompt) for variant in variants]
        try:
            if how == "fast":
                Decoder(variants[0].model, 1, 2)  # raises here if it cannot decode this model
            groups.append(group)
        except LlmqError as error:
            missing.append({"what": what, "how": how, "batch": batch, "why": str(error)})
    times = in_turns(groups, seconds, sizes.rounds)
    rows: list[dict[str, Any]] = []
    for group, group_times in zip(groups, times, strict=True):
        if not group_times[0]:
            case = group[0]
            why = f"no time left of {seconds:.0f} s; raise seconds or measure fewer cases"
            missing.append({"what": case.what, "how": case.how, "batch": case.batch, "why": why})
            continue
        first = statistics.median(group_times[0])
        rows += [row_of(case, timed, first) for case, timed in zip(group, group_times, strict=True)]
    return rows, missing


def planned(variants: Sequence[Variant], sizes: Sizes) -> list[tuple[str, str, int, int]]:
    """(what, how, batch, tokens) of each case. Raises `LlmqError` if the model's context is too short to decode."""
    context = context_length(variants[0].model) or sizes.prefill + sizes.prompt + sizes.new
    if sizes.prompt + sizes.new >= context:
        raise LlmqError(
            f"prompt + new must be below the model's context length {context}; got {sizes.prompt + sizes.new}"
        )
    listed = [("prefill", "prefill", 1, min(sizes.prefill, context))]
    return listed + [("decode", how, batch, sizes.new) for batch in sizes.batches for how in ("eager", "fast")]


def row_of(case: SpeedCase, times: Sequence[float], first: float) -> dict[str, Any]:
    """JSON values. speedup: over the first form of its group."""
    median = statistics.median(times)
    steps = 1 if case.what == "prefill" else case.tokens
    return {
        "what": case.what,
        "how": "fast" if case.how == "fast" else "eager",
        "note": case.note,
        "variant": case.variant.name,
        "batch": case.batch,
        "tokens": case.tokens,
        "tokens_per_second": case.batch * case.tokens / median,
        "ms_per_forward": 1000 * median / steps,
        "fastest_ms": 1000 * min(times) / steps,
        "slowest_ms": 1000 * max(times) / steps,
        "speedup": first / median,
        "runs": len(times),
        "grown_bytes": case.grown,
    }
