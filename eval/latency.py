"""How fast a model reads a prompt and generates tokens, and how much memory it takes.

Two figures that must not be mixed: prefill (one forward over the prompt, bound by arithmetic) and decode (one token per
forward with a key/value cache, bound by reading the weights). The prompt consists of seeded random ids: speed does not
depend on the words. Decoding is greedy and implemented here, so that none of `generate()` is timed. Every repeat starts
with an empty cache that the model creates. One untimed run comes first (kernels are chosen, layouts packed, pages
touched), and the median of the repeats is reported. Several models are measured in turns, repeat by repeat: a machine
whose speed drifts slows all of them alike and their ratios hold.

Speed says nothing about whether the output is right: report it together with a perplexity. Left out: static caches and
compiled graphs, time to first token under load, batches of unequal lengths.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.base import Column, ModelMetric
from llmq.eval.models import context_length, evaluation_mode, input_device, random_ids, wait
from llmq.memory import format_bytes, peak_rss_bytes

WARM_UP_TOKENS = 2
PROMPT_TOKENS, NEW_TOKENS = 512, 64
"""Sizes that `evaluate` measures with; smaller if the smallest context of the models requires it."""


@dataclass(frozen=True)
class Latency:
    """Speed of one model on one device, medians of `repeats`.

    Fields:
        prefill_tokens_per_second: batch_size * prompt_tokens over the time of the one forward.
        decode_tokens_per_second: batch_size * new_tokens over the time of the single-token forwards.
        weight_bytes: size of the model's parameters and buffers, as stored.
        peak_memory_bytes: see `memory`; None if the platform does not report it, and for models measured in turns.
        memory: what `peak_memory_bytes` counts: bytes allocated on the GPU since the start of the measurement, or on the
            CPU the largest resident set of the process since *it* started, which includes loading.
        prompt_tokens: tokens of the prompt, per sequence.
        new_tokens: generated tokens, per sequence.
        batch_size: number of sequences.
        repeats: number of timed repeats.
        device: name of the GPU, or "cpu".
        threads: number of torch's CPU threads.
        dtype: of the model's activations.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    peak_memory_bytes: int | None
    memory: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int
    device: str
    threads: int
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values under the one key `speed`."""
        return {"speed": asdict(self)}


def measure(
    model: nn.Module,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    batch_size: int = 1,
    repeats: int = 3,
) -> Latency:
    """Prefill and decode speed of a transformers causal LM, on the device of its weights.

    Raises `LlmqError` for sizes below 1, and if prompt and new tokens exceed the model's context.
    """
    return measure_in_turns([model], prompt_tokens, new_tokens, batch_size, repeats)[0]


def measure_in_turns(
    models: Sequence[nn.Module],
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    batch_size: int = 1,
    repeats: int = 3,
) -> list[Latency]:
    """As `measure`, for several loaded models: every repeat runs each of them once, in order."""
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats}
    for model in models:
        _check(model, sizes)
        if input_device(model).type == "cuda":
            torch.cuda.reset_peak_memory_stats(input_device(model))
    prompts = [random_ids(model, batch_size, prompt_tokens) for model in models]
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for model, prompt, model_times in zip(models, prompts, times, strict=True):
            with evaluation_mode(model):
                if repeat == 0:
                    once(model, prompt, min(WARM_UP_TOKENS, new_tokens))
                else:
                    model_times.append(once(model, prompt, new_tokens))
    alone = len(models) == 1
    return [_latency(model, model_times, sizes, alone) for model, model_times in zip(models, times, strict=True)]


def measure_within_context(models: Sequence[nn.Module]) -> list[Latency]:
    """As `measure_in_turns`, with a prompt and new tokens that fit the smallest context of the models."""
    context = context_length(*models)
    if context is None:
        return measure_in_turns(models)
    new = min(NEW_TOKENS, max(1, context // 4))
    return measure_in_turns(models, max(1, min(PROMPT_TOKENS, context - new)), new)


def _latency(model: nn.Module, times: Sequence[tuple[float, float]], sizes: dict[str, int], alone: bool) -> Latency:
    device = input_device(model)
    memory, peak = _peak_memory(device)
    prefill, decode = (statistics.median(seconds) for seconds in zip(*times, strict=True))
    return Latency(
        prefill_tokens_per_second=sizes["batch_size"] * sizes["prompt_tokens"] / prefill,
        decode_tokens_per_second=sizes["batch_size"] * sizes["new_tokens"] / decode,
        weight_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        peak_memory_bytes=peak if alone else None,
        memory=memory,
        **sizes,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        dtype=str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
    )


def _check(model: nn.Module, sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise LlmqError(f"{name} must be at least 1; got {value}")
    context = context_length(model)
    needed = sizes["prompt_tokens"] + sizes["new_tokens"]
    if context is not None and needed > context:
        raise LlmqError(
            f"prompt_tokens + new_tokens must fit the model's context of {context}; got {needed}; use smaller ones"
        )


def once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill of `prompt` [batch, tokens], and of `new_tokens` single-token forwards after it."""
    # As generate() does: without it the prefill would also compute logits that are not used.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    wait(prompt.device)
    started = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, **last)
    token = _greedy(output)
    wait(prompt.device)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **last)
        token = _greedy(output)
    wait(prompt.device)
    return prefilled - started, time.perf_counter() - prefilled


def _greedy(output: Any) -> Tensor:
    """The most likely next tokens: int64 `[batch, 1]`."""
    token: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
    return token


def _peak_memory(device: torch.device) -> tuple[str, int | None]:
    if device.type == "cuda":
        return "allocated on the GPU during the measurement", torch.cuda.max_memory_allocated(device)
    return "largest resident set of the process since it started", peak_rss_bytes()


def _ratio(mine: float, first: float, is_first: bool) -> str:
    return "" if is_first else f"{mine / first:.2f}x"


def _title(first: Latency) -> str:
    where = first.device if first.device != "cpu" else f"cpu (threads: {first.threads})"
    return (
        f"speed in tokens/s on {where}, {first.dtype}: "
        f"prefill of {first.prompt_tokens} tokens, then decode of {first.new_tokens}"
    )


SPEED = ModelMetric(
    name="speed",
    optional=True,
    measure=measure_within_context,
    title=_title,
    columns=(
        Column("prefill", lambda result, first: f"{result.prefill_tokens_per_second:.1f}"),
        Column(
            "vs. first",
            lambda result, first: _ratio(
                result.prefill_tokens_per_second, first.prefill_tokens_per_second, result is first
            ),
        ),
        Column("decode", lambda result, first: f"{result.decode_tokens_per_second:.1f}"),
        Column(
            "vs. first",
            lambda result, first: _ratio(
                result.decode_tokens_per_second, first.decode_tokens_per_second, result is first
            ),
        ),
        Column("weights", lambda result, first: format_bytes(result.weight_bytes)),
    ),
)
