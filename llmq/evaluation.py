"""What the commands `evaluate` and `generate` do: load any model, plain or quantized, and measure it or let it write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llmq.api import pick_device
from llmq.calibration import read_dataset, tokens_of
from llmq.errors import LlmqError
from llmq.eval.divergence import divergence
from llmq.eval.latency import Latency, measure_in_turns
from llmq.eval.models import context_length
from llmq.eval.perplexity import Perplexity, comparable, paired_difference, perplexity

PROMPT, NEW = 512, 64
"""Tokens that `speed_of` reads and writes, or as many as the smallest context admits."""


def open_model(source: Any, dtype: str, device: str = "cpu", revision: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, repo id or GGUF value, plain or quantized; every float in `dtype`."""
    from llmq.hf.quantizer import load, quantization_config_of
    from llmq.hf.source import open_source
    from llmq.hf.source_base import quiet

    path = isinstance(source, (str, Path)) and not str(source).endswith(".gguf")
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    if path:
        try:
            with quiet():
                packed = quantization_config_of(source, **hub) is not None  # `load` says why llmq cannot run it
        except (OSError, ValueError):
            packed = False  # `open_source` below says what is wrong with it
        if packed:
            with quiet():
                model = load(source, dtype=dtype, **hub).to(device)
                return model.eval(), _tokenizer(source, hub)
    opened = open_source(source, dtype=dtype, device=device, revision=revision)
    opened.load_outer()
    for index in range(len(opened)):
        opened.load_block(index)
    return opened.model.eval(), opened.tokenizer()


def evaluation_dtype(dtype: str, place: str) -> str:
    """`auto` -> float32 on a CPU, else bfloat16; any other as it is."""
    return ("float32" if place == "cpu" else "bfloat16") if dtype == "auto" else dtype


def _tokenizer(source: Any, hub: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)
    except (OSError, ValueError, TypeError) as error:
        raise LlmqError(
            f"{source} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); "
            "put its files (tokenizer.json, tokenizer_config.json) beside the weights"
        ) from error


def perplexity_of(
    source: Any,
    *,
    dataset: str = "builtin",
    window: int = 2048,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    against: torch.nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Perplexity, dict[str, Any]]:
    """The perplexity of a model on a text, and the same as JSON values. dtype `auto`: float32 on a CPU, else bfloat16.

    against: the loaded original; the divergence from it is measured on the same windows and put into the JSON values.
    """
    text = read_dataset(dataset, "evaluation")  # refused before a model is loaded, where it is
    place = pick_device(device)
    kind = evaluation_dtype(dtype, place)
    model, tokenizer = open_model(source, kind, place, revision)
    ids, corpus = tokens_of(dataset, text, tokenizer)
    ids = ids[: corpus.max_tokens]
    apart = None
    if against is None:
        result = perplexity(model, ids, window, limit, batch_size, progress, tokenizer)
    else:
        apart = divergence(against, model, ids, window, limit, batch_size, progress, tokenizer)
        result = apart.perplexity
    told: dict[str, Any] = {
        "perplexity": result.value,
        "stderr": result.stderr,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "windows": result.windows,
        "window": result.window,
        "dataset": corpus.name,
        "dtype": kind,
        "protocol": result.protocol,
        "seconds": round(result.seconds, 2),
    }
    if apart is not None:
        told |= {"kl": apart.kl, "kl_stderr": apart.kl_stderr, "top1": apart.top1, "top1_stderr": apart.top1_stderr}
    return result, told


def compared(first: Perplexity, other: Perplexity) -> dict[str, float | None]:
    """JSON values of the paired difference to the first model; none for the first itself, and for other tokens."""
    if other is first or not comparable(first, other):
        return {}
    difference, error = paired_difference(first, other)
    return {"to_first": difference, "to_first_stderr": error}


def speed_of(
    sources: Sequence[Any], *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> tuple[list[Latency], str]:
    """Prefill and decode speed of several models, loaded together and measured in turns; and the dtype (auto: bfloat16)."""
    place, kind = pick_device(device), "bfloat16" if dtype == "auto" else dtype
    models = [open_model(source, kind, place, revision)[0] for source in sources]
    context = min((length for model in models if (length := context_length(model))), default=PROMPT + NEW)
    new = min(NEW, max(1, context // 4))
    return measure_in_turns(models, max(1, min(PROMPT, context - new)), new), kind


def generate_text(
    source: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    raw: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    stream: bool = True,
) -> dict[str, Any]:
    """Greedy text, streamed to stdout where asked; through the chat template unless `raw` or there is none."""
    from transformers import TextStreamer

    if max_new_tokens < 1:
        raise LlmqError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not prompt.strip():
        raise LlmqError("the prompt is empty: give some text")
    place = pick_device(device)
    model, tokenizer = open_model(source, "bfloat16" if dtype == "auto" else dtype, place, revision)
    if raw or not getattr(tokenizer, "chat_template", None):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = inputs["input_ids"].to(place)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    seconds = time.perf_counter() - began
    new = out[0, ids.shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(new) / seconds, 2),
    }
