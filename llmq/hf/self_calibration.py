"""Calibration text that the model writes itself, one token at a time, where none is at hand or none resembles its own.

Each window begins with the token that begins a text (`TextStart`) and is drawn from the model's own distribution, unchanged:
temperature 1, no top-k, nothing of its generation config. Where the model ends a text before its window is full, the next
text begins there, as in text packed for training; so every window is full and nothing is padded.

Draws invert the cumulative distribution in float64 at numbers that are drawn beforehand, one per token, by a generator of
their own: the global one is untouched, the numbers are the same on every device, and those of a window depend neither on
how many follow nor on how many are written at a time. `generate` runs the model, with its cache; our processor leaves it one
token to choose. After Williams et al., arXiv 2410.17170, and LLM-QAT, arXiv 2305.17888.

Left out: prompts to write about, top-k, stopping at repetition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from llmq.errors import LlmqError
from llmq.hf.source_base import Source, quiet

ROWS = 16  # windows written at a time, whatever the memory: the bytes must not depend on it
WARMING = 4  # steps of each batch that are not timed
TIMED = 8  # steps that an estimate rests on, at least; an eighth of a window's where that is more
TOLD_EVERY = 1.0  # seconds

Told = Callable[[int, int, float | None], None]
"""Tokens written, tokens in all, and seconds left by those timed so far (None before)."""


@dataclass(frozen=True)
class TextStart:
    """tokens: int64 [n], those that a text may begin with, drawn uniformly. ends: the ids after which a text begins."""

    tokens: Tensor
    ends: tuple[int, ...]

    def __str__(self) -> str:
        return f"token {int(self.tokens)}" if len(self.tokens) == 1 else f"one of {len(self.tokens)} tokens"


def text_start(source: Source) -> TextStart:
    """By the tokenizer: its BOS; where it has none, any token of its vocabulary that is not special.

    The config's `bos_token_id` is not asked: where a checkpoint states none it is its class's default, a number of another
    vocabulary. Raises `LlmqError` without a tokenizer, and for one that does not fit the model.
    """
    try:
        tokenizer = source.tokenizer()
    except LlmqError as error:
        raise LlmqError(
            f"dataset self needs the model's tokenizer, which says what a text begins and ends with: {error}; "
            "or give token ids or another dataset"
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
            f"dataset self must begin texts with a token of the model's {text.vocab_size}; the tokenizer has "
            f"{len(tokenizer)}, and begins texts with {first[-1:] or 'none'}: give the model's own tokenizer"
        )
    return TextStart(torch.tensor(first), tuple(sorted(end for end in ends if isinstance(end, int))))


def generate_windows(
    source: Source,
    start: TextStart,
    count: int,
    length: int,
    seed: int,
    told: Told = lambda done, total, left: None,
) -> Tensor:
    """`count` windows of `length` tokens that the model writes: int64 [count, length], on the CPU.

    The whole model is loaded meanwhile and released after. told: called before the first token, then about every second; an
    exception that it raises ends the writing.
    Raises `LlmqError` where the model's output is not finite.
    """
    draws = torch.rand(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    clock = _Clock(count, length, told)
    clock.tell()
    with _whole(source) as model:
        rows = [_write(model, part.to(source.device), start, clock) for part in torch.split(draws, ROWS)]
    return torch.cat(rows)


def _write(model: PreTrainedModel, draws: Tensor, start: TextStart, clock: _Clock) -> Tensor:
    """Windows int64 [rows, length] written at once; draws: float64 [rows, length] in [0, 1), one per token."""
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
        logits_processor=[_Draw(draws, start, clock)],
    )
    return ids.cpu()


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token of each row possible: that at the row's next number, or a first one where a text has ended."""

    def __init__(self, draws: Tensor, start: TextStart, clock: _Clock) -> None:
        self._draws, self._clock = draws, clock
        self._first = start.tokens.to(draws.device)
        self._ends = torch.tensor(start.ends, dtype=torch.int64, device=draws.device)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        at = self._draws[:, ids.shape[1], None]  # [rows, 1]
        reached = torch.softmax(scores.double(), -1).cumsum(-1)  # [rows, vocabulary]
        total = reached[:, -1:]
        if not bool(torch.isfinite(total).all()):
            raise LlmqError(
                "the model wrote NaN or inf instead of text: it is broken, or overflows in its dtype; "
                "try --dtype bfloat16 or float32, or another dataset"
            )
        token = torch.searchsorted(reached, at * total, right=True)
        ended = torch.isin(ids[:, -1:], self._ends)
        token = torch.where(ended, _pick(self._first, at), token.clamp_max(scores.shape[1] - 1))
        self._clock.step()
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _pick(tokens: Tensor, at: Tensor) -> Tensor:
    """The tokens [rows, 1] at `at` [rows, 1] in [0, 1), all alike likely."""
    return tokens[(at * len(tokens)).long()]


class _Clock:
    """What is told of the writing: its tokens, and the time left by a line through the times of the steps so far.

    A step takes longer the more tokens are in the cache; every batch goes through the same lengths.
    """

    def __init__(self, count: int, length: int, told: Told) -> None:
        self._count, self._length, self._told = count, length, told
        self._rows = self._done = 0  # windows of the batch being written, and of those before
        self._tokens = 0  # per window of the batch
        self._times: list[tuple[int, float]] = []  # (tokens before, seconds), of all steps timed
        self._enough = max(TIMED, length // 8)
        self._last = self._told_at = time.perf_counter()

    def begin(self, rows: int) -> None:
        self._done += self._rows
        self._rows, self._tokens, self._last = rows, 1, time.perf_counter()

    def step(self) -> None:
        now = time.perf_counter()
        if self._tokens > WARMING:
            self._times.append((self._tokens, now - self._last))
        self._last = now
        self._tokens += 1
        if now - self._told_at >= TOLD_EVERY or len(self._times) == self._enough:
            self._told_at = now
            self.tell()

    def tell(self) -> None:
        written = self._done * self._length + self._rows * self._tokens
        self._told(written, self._count * self._length, self._left())

    def _left(self) -> float | None:
        if len(self._times) < self._enough:
            return None
        lengths, seconds = torch.tensor(self._times, dtype=torch.float64).T
        middle = lengths.mean()
        spread = float(((lengths - middle) ** 2).sum())
        slope = max(0.0, float(((lengths - middle) * (seconds - seconds.mean())).sum()) / spread) if spread else 0.0
        base = float(seconds.mean() - slope * middle)
        steps = range(self._tokens, self._length)
        here = sum(base + slope * step for step in steps)
        later = -(-(self._count - self._done - self._rows) // ROWS)
        return here + later * (self._length * base + slope * self._length * (self._length - 1) / 2)


@contextmanager
def _whole(source: Source) -> Iterator[PreTrainedModel]:
    """The whole model with its weights, and a generation config that changes nothing; both as they were afterwards."""
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
