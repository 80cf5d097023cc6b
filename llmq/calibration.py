"""Text to calibration windows: tokenised once, cut into full windows, drawn by a seed.

The stream of tokens is cut into non-overlapping windows of `seq_len` and the tail is dropped, so every window is full
and no padding ever reaches a statistic. Where there are more windows than asked for, `torch.randperm` with its own
seeded generator draws them, in that order: the same text, tokenizer, sizes and seed give the same windows anywhere.

The tokenizer is a value; nothing here knows which library it came from. Left out: one sample per document (short
documents would need padding or would calibrate on few positions), a random offset of the first window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.config import SELF
from llmq.errors import LlmqError
from llmq.eval.corpus import Corpus, Split, is_conversations, load_conversations, load_text


@dataclass(frozen=True)
class GenerationProgress:
    """Progress of a model that writes its own text: tokens written `done` of `total`; seconds left, None until some are timed."""

    done: int
    total: int
    left: float | None


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """The whole text as one stream of token ids: int64 `[tokens]`, with the tokenizer's default special tokens.

    tokenizer: a callable as of transformers, `tokenizer(text)["input_ids"]`.
    """
    # Without verbose=False it warns that the text is longer than the model's context: it is cut into windows later.
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


Conversations = list[list[dict[str, Any]]]


def read_dataset(dataset: str, split: Split) -> Corpus | Conversations:
    """A dataset's text, or its conversations. Raises `LlmqError` for what `llmq.eval.corpus` refuses, and for `self`."""
    if dataset == SELF:
        raise LlmqError(
            "dataset self is what a model writes to be calibrated on: name a text to evaluate on (./self for a file)"
        )
    return load_conversations(dataset) if is_conversations(dataset) else load_text(dataset, split)


def tokenize_dataset(dataset: str, text: Corpus | Conversations, tokenizer: Any) -> tuple[Tensor, Corpus]:
    """One stream of ids int64 `[tokens]` of what `read_dataset` gave for `dataset`, and what it is. Conversations go through
    the chat template, one after the other, with all the special tokens that it writes and no others.

    Raises `LlmqError` for conversations that no chat template takes.
    """
    if isinstance(text, Corpus):
        return tokenize(tokenizer, text.text), text
    if not getattr(tokenizer, "chat_template", None):
        raise LlmqError(
            f"{dataset} holds conversations, and the model's tokenizer has no chat template; give plain text"
        )
    try:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in text]
    except Exception as error:  # a template raises what it likes on roles that it does not know
        raise LlmqError(f"{dataset} does not fit the model's chat template: {str(error).splitlines()[0]}") from error
    ids = [i for part in texts for i in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]]
    return torch.tensor(ids, dtype=torch.int64), Corpus(
        dataset, "".join(texts), f"{len(text)} conversations of {dataset}"
    )


def read_tokens(dataset: str, split: Split, tokenizer: Any) -> tuple[Tensor, Corpus]:
    """`tokenize_dataset` what `read_dataset` gives."""
    return tokenize_dataset(dataset, read_dataset(dataset, split), tokenizer)


def check_token_ids(token_ids: Any, config: Any) -> Tensor:
    """A caller's own windows, int64 `[windows, tokens]` (a tensor or lists), fit for a model with this text config.

    Raises `LlmqError` for other shapes and dtypes, ids outside the vocabulary and windows longer than the context.
    """
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LlmqError(f"calibration must be a Calibration or token ids [windows, tokens]: {error}") from None
    if ids.ndim != 2 or ids.dtype != torch.int64 or not ids.numel():
        raise LlmqError(f"calibration token ids must be int64 [windows, tokens]; got {ids.dtype} {list(ids.shape)}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise LlmqError(
            f"calibration token ids must lie in the model's vocabulary of {config.vocab_size}; "
            f"they go from {int(ids.min())} to {int(ids.max())}"
        )
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and ids.shape[1] > context:
        raise LlmqError(f"calibration windows must fit the model's context of {context}; got {ids.shape[1]} tokens")
    return ids


def cut_windows(token_ids: Tensor, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Full windows of the token stream: int64 `[n, seq_len]`, n the smaller of `num_samples` and what the text gives.

    token_ids: int64 `[tokens]`.
    Where the text gives fewer than `num_samples` windows all are used, in the order of the text (no draw).

    Raises `LlmqError` where the text gives not even one window, or a size is below 1.
    """
    for name, value in (("num_samples", num_samples), ("seq_len", seq_len)):
        if value < 1:
            raise LlmqError(f"{name} must be at least 1; got {value}")
    tokens = token_ids.numel()
    count = tokens // seq_len
    if count < 1:
        shorter = f" or a seq_len of at most {tokens}" if tokens else ""
        raise LlmqError(
            f"calibration needs at least one full window: the text has {tokens} tokens and a window has {seq_len}; "
            f"use a longer text{shorter}"
        )
    cut = token_ids[: count * seq_len].view(count, seq_len)
    if count <= num_samples:
        return cut
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return cut[order]
