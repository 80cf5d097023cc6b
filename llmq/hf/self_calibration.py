"""Calibration text that the model generates itself, for use when no suitable text is available.

Each window begins with a token that begins a text (`TextStart`). The tokens after it are sampled from the model's own
distribution, unchanged: temperature 1, no top-k, nothing of its generation config. If the model ends a text before the
window is full, the next text begins there, as in packed training data. Every window is full and nothing is padded.

Sampling inverts the cumulative distribution in float64 at uniform numbers. These are drawn beforehand, one per token,
by a separate generator: the global generator is untouched, the numbers are the same on every device, and those of one
window depend neither on how many windows follow nor on how many are generated at a time. `generate` runs the model with
its KV cache; a logits processor leaves it one token to choose from. After Williams et al., arXiv 2410.17170, and
LLM-QAT, arXiv 2305.17888.

Left out: prompts that name a topic, top-k, stopping at repetition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import StatisticsError, fmean, linear_regression

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from llmq.errors import LlmqError
from llmq.hf.source_base import Source, quiet

ROWS = 16  # windows generated at a time, whatever the memory, so that the text does not depend on it
WARMUP_STEPS = 4  # first steps of each batch, which are not timed
MIN_TIMED_STEPS = 8  # an estimate needs this many timed steps, or an eighth of a window's if that is more
REPORT_EVERY = 1.0  # seconds

ReportProgress = Callable[[int, int, float | None], None]
"""(tokens generated, tokens in all, estimated seconds left or None while too few steps are timed) -> None."""


@dataclass(frozen=True)
class TextStart:
    """Where texts begin.

    Fields:
        tokens: int64 [n], the tokens that a text may begin with; one is drawn uniformly.
        ends: the ids after which a text has ended.
    """

    tokens: Tensor
    ends: tuple[int, ...]

    def __str__(self) -> str:
        return f"token {int(self.tokens)}" if len(self.tokens) == 1 else f"one of {len(self.tokens)} tokens"


def text_start(source: Source) -> TextStart:
    """The tokenizer's BOS; if it has none, any token of its vocabulary that is not special.

    The config's `bos_token_id` is not used: if a checkpoint states none, it is the default of the config class, which
    belongs to another vocabulary. Raises `LlmqError` without a tokenizer and for one that does not fit the model.
    """
    try:
        tokenizer = source.tokenizer()
    except LlmqError as error:
        raise LlmqError(
            f"dataset self needs the model's tokenizer, to know how a text begins and ends: {error}; "
            "or use token ids or another dataset"
        ) from error
    text = source.config.get_text_config(decoder=True)
    words = min(len(tokenizer), text.vocab_size)
    stated = text.eos_token_id
    ends = {tokenizer.eos_token_id, *(stated if isinstance(stated, (list, tuple)) else (stated,))}
    if tokenizer.bos_token_id is not None:
        first = [tokenizer.bos_token_id]
    else:
        first = sorted(set(range(words)) - set(tokenizer.all_special_ids))
    if not first or not 0 <= first[-1] < text.vocab_size:
        raise LlmqError(
            f"dataset self must begin texts with one of the model's {text.vocab_size} tokens; the tokenizer has "
            f"{len(tokenizer)} tokens and begins texts with {first[-1:] or 'none'}; use the model's own tokenizer"
        )
    return TextStart(torch.tensor(first), tuple(sorted(end for end in ends if isinstance(end, int))))


def generate_windows(
    source: Source,
    start: TextStart,
    count: int,
    length: int,
    seed: int,
    progress: ReportProgress = lambda done, total, left: None,
) -> Tensor:
    """`count` windows of `length` tokens that the model generates: int64 [count, length], on the CPU.

    The whole model is loaded for that and released afterwards.
    progress: called before the first token and then about once a second. An exception that it raises ends the run.
    Raises `LlmqError` if the model's output is not finite.
    """
    draws = torch.rand(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    clock = _Clock(count, length, progress)
    clock.report()
    with _whole_model(source) as model:
        rows = [_generate(model, part.to(source.device), start, clock) for part in torch.split(draws, ROWS)]
    return torch.cat(rows)


def _generate(model: PreTrainedModel, draws: Tensor, start: TextStart, clock: _Clock) -> Tensor:
    """Windows int64 [rows, length], generated as one batch. draws: float64 [rows, length] in [0, 1), one per token."""
    rows, length = draws.shape
    first = _pick(start.tokens.to(draws.device), draws[:, :1])
    clock.begin(rows)
    if length == 1:
        return first.cpu()
    settings = GenerationConfig(max_new_tokens=length - 1, do_sample=False, use_cache=True, pad_token_id=0)
    ids: Tensor = model.generate(
        input_ids=first,
        attention_mask=torch.ones_like(first),
        generation_config=settings,
        logits_processor=[_Sampler(draws, start, clock)],
    )
    return ids.cpu()


class _Sampler(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token possible in each row: the sampled one, or one that begins a text if a text has just ended."""

    def __init__(self, draws: Tensor, start: TextStart, clock: _Clock) -> None:
        self._draws, self._clock = draws, clock
        self._first = start.tokens.to(draws.device)
        self._ends = torch.tensor(start.ends, dtype=torch.int64, device=draws.device)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        at = self._draws[:, ids.shape[1], None]  # [rows, 1]
        cumulative = torch.softmax(scores.double(), -1).cumsum(-1)  # [rows, vocabulary]
        total = cumulative[:, -1:]
        if not bool(torch.isfinite(total).all()):
            raise LlmqError(
                "dataset self needs finite logits; the model's are NaN or inf: it is broken or overflows in its dtype; "
                "use --dtype bfloat16 or float32, or another dataset"
            )
        token = torch.searchsorted(cumulative, at * total, right=True)
        ended = torch.isin(ids[:, -1:], self._ends)
        token = torch.where(ended, _pick(self._first, at), token.clamp_max(scores.shape[1] - 1))
        self._clock.step()
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _pick(tokens: Tensor, at: Tensor) -> Tensor:
    """One of `tokens` for each number of `at` [rows, 1] in [0, 1), with equal probabilities: int64 [rows, 1]."""
    return tokens[(at * len(tokens)).long()]


class _Clock:
    """Counts the tokens, times the steps and reports both, with an estimate of the time left.

    A step takes longer the more tokens the cache holds. The estimate is a straight line through the times of all steps
    so far; every batch goes through the same lengths.
    """

    def __init__(self, count: int, length: int, progress: ReportProgress) -> None:
        self._count, self._length, self._progress = count, length, progress
        self._rows = self._done = 0  # windows of this batch, and of the batches before it
        self._tokens = 0  # tokens of each window of this batch
        self._times: list[tuple[int, float]] = []  # (tokens in the cache, seconds) of every timed step
        self._enough = max(MIN_TIMED_STEPS, length // 8)
        self._last = self._reported = time.perf_counter()

    def begin(self, rows: int) -> None:
        self._done += self._rows
        self._rows, self._tokens, self._last = rows, 1, time.perf_counter()

    def step(self) -> None:
        now = time.perf_counter()
        if self._tokens > WARMUP_STEPS:
            self._times.append((self._tokens, now - self._last))
        self._last = now
        self._tokens += 1
        if now - self._reported >= REPORT_EVERY or len(self._times) == self._enough:
            self._reported = now
            self.report()

    def report(self) -> None:
        generated = self._done * self._length + self._rows * self._tokens
        self._progress(generated, self._count * self._length, self._left())

    def _left(self) -> float | None:
        if len(self._times) < self._enough:
            return None
        lengths, seconds = zip(*self._times, strict=True)
        try:
            slope = max(0.0, linear_regression(lengths, seconds).slope)
        except StatisticsError:  # all steps had the same length
            slope = 0.0
        base = fmean(seconds) - slope * fmean(lengths)
        this_batch = sum(base + slope * step for step in range(self._tokens, self._length))
        batches = -(-(self._count - self._done - self._rows) // ROWS)
        return this_batch + batches * (self._length * base + slope * self._length * (self._length - 1) / 2)


@contextmanager
def _whole_model(source: Source) -> Iterator[PreTrainedModel]:
    """The model with all its weights and a default generation config. Both are restored afterwards."""
    model = source.model
    kept = model.generation_config
    source.load_outer()
    try:
        model.generation_config = GenerationConfig()
        with quiet():
            for index in range(len(source)):
                source.load_block(index)
            yield model
    finally:
        model.generation_config = kept
        for index in range(len(source)):
            source.release_block(index)
