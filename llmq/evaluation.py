"""The public verbs that run models, plain or quantized: `evaluate` measures them, `generate_text` lets one generate.

    evaluate        text -> for each model: load -> one pass over the text's windows for all text metrics -> drop
                    then, if a requested metric needs models alone: load all -> measure them in turns

Which metrics there are: `llmq.eval.registry.METRICS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.api import pick_device
from llmq.calibration import check_vocabulary, read_dataset, tokenize_dataset
from llmq.errors import LlmqError
from llmq.eval import registry
from llmq.eval.base import ModelMetric
from llmq.eval.scoring import score


@dataclass(frozen=True)
class Evaluation:
    """The results of one model.

    Fields:
        model: its name.
        dataset: the text that it was evaluated on.
        dtype: of the model during the pass over the text.
        seconds: wall time of that pass, without loading.
        results: by metric name, in the order of `METRICS`.
    """

    model: str
    dataset: str
    dtype: str
    seconds: float
    results: Mapping[str, Any]

    def to_dict(self, first: Evaluation | None = None) -> dict[str, Any]:
        """JSON values of all metrics in one object. first: the model to compare with, if another."""
        values: dict[str, Any] = {
            "model": self.model,
            "dataset": self.dataset,
            "dtype": self.dtype,
            "seconds": round(self.seconds, 2),
        }
        for metric in registry.METRICS:
            if metric.name in self.results:
                values |= self.results[metric.name].to_dict()
                if first is not None and first is not self:
                    values |= metric.comparison(first.results[metric.name], self.results[metric.name])
        return values


def evaluate(
    sources: Sequence[tuple[str, Any]],
    *,
    original: Any = None,
    metrics: Sequence[str] = (),
    dataset: str = "builtin",
    window: int = 2048,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Evaluation]:
    """Evaluate models on the same text, one after the other.

    sources: (name, folder, repo id or GGUF file) of each model, plain or quantized.
    original: the model that they were made from, which stays loaded; without it, metrics that need it are left out.
    metrics: names of optional metrics to compute as well.
    dataset: `builtin`, `wikitext2`, `c4`, or the path of a text file or of a `.jsonl` file of conversations.
    window, limit, batch_size: see `llmq.eval.scoring.score`.
    dtype: of every model; `auto` is float32 on a CPU, else bfloat16 (bfloat16 everywhere for metrics of models alone).
    device: `auto` is CUDA if available, else the CPU. revision: branch, tag or commit of repo ids.
    progress: called with (name, windows done, windows in total).
    Raises `LlmqError` for an unknown metric, and for whatever makes a model, a text or a pass unusable.

    (Over 50 lines: signature and docstring are half of them.)
    """
    from llmq.hf.inference import open_model

    text_metrics, model_metrics = registry.select_metrics(metrics, original is not None)
    text = read_dataset(dataset, "evaluation")  # before a model is loaded, so that a wrong name fails at once
    place = pick_device(device)
    text_dtype = ("float32" if place == "cpu" else "bfloat16") if dtype == "auto" else dtype
    reference = None if original is None else open_model(original, text_dtype, place, revision)[0]
    evaluations = []
    for name, source in sources:
        model, tokenizer = open_model(source, text_dtype, place, revision)
        ids, corpus = tokenize_dataset(dataset, text, tokenizer)
        begin = _begin(tokenizer, ids)
        started = time.perf_counter()
        results = score(
            text_metrics,
            model,
            ids[len(begin) :][: corpus.max_tokens],
            original=reference,
            window=window,
            limit=limit,
            batch_size=batch_size,
            progress=partial(progress, name),
            tokenizer=tokenizer,
            begin=begin,
        )
        evaluations.append(Evaluation(name, corpus.name, text_dtype, time.perf_counter() - started, results))
        del model  # before the next one is loaded
    del reference
    if not model_metrics:
        return evaluations
    model_dtype = "bfloat16" if dtype == "auto" else dtype
    models = [open_model(source, model_dtype, place, revision)[0] for _, source in sources]
    return _add_model_metrics(evaluations, model_metrics, models)


def _begin(tokenizer: Any, ids: Tensor) -> list[int]:
    """The special tokens that the tokenizer puts before a text, if `ids` begin with them; else none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    places = (i for i in range(len(full)) if plain and full[i : i + len(plain)] == plain)
    begin = list(full[: next(places, 0)])
    return begin if ids[: len(begin)].tolist() == begin else []


def _add_model_metrics(
    evaluations: Sequence[Evaluation], metrics: Sequence[ModelMetric[Any]], models: Sequence[nn.Module]
) -> list[Evaluation]:
    """The evaluations with the results of `metrics`, measured on all models together."""
    measured = {metric.name: metric.measure(models) for metric in metrics}
    return [
        replace(evaluation, results={**evaluation.results, **{name: rows[i] for name, rows in measured.items()}})
        for i, evaluation in enumerate(evaluations)
    ]


@dataclass(frozen=True)
class Generated:
    """Text that a model generated.

    Fields:
        text: the new text, without special tokens.
        prompt_tokens: number of tokens of the prompt, with those of the chat template.
        new_tokens: number of generated tokens.
        seconds: wall time of `generate`, without loading.
        tokens_per_second: new_tokens over seconds.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rounded = {"seconds": round(self.seconds, 3), "tokens_per_second": round(self.tokens_per_second, 2)}
        return asdict(self) | rounded


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
) -> Generated:
    """Generate text greedily.

    source: a folder, repo id or GGUF file, plain or quantized.
    prompt: formatted with the chat template of the tokenizer, unless `raw` or if there is none.
    max_new_tokens: the maximum number of new tokens.
    dtype: `auto` is bfloat16. device: `auto` is CUDA if available, else the CPU. revision: of a repo id.
    stream: print the text to stdout as it is generated.
    Raises `LlmqError` for an empty prompt, max_new_tokens below 1, and a model that cannot be opened.
    """
    from llmq.hf.inference import open_model, stdout_streamer

    if max_new_tokens < 1:
        raise LlmqError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not prompt.strip():
        raise LlmqError("the prompt must not be empty; pass some text with --prompt")
    place = pick_device(device)
    model, tokenizer = open_model(source, "bfloat16" if dtype == "auto" else dtype, place, revision)
    ids = _prompt_ids(tokenizer, prompt, raw).to(place)
    check_vocabulary(ids, model.get_input_embeddings().weight.shape[0], "token ids of the prompt")
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=stdout_streamer(tokenizer) if stream else None,
        )
    seconds = time.perf_counter() - started
    new = output[0, ids.shape[1] :]
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        seconds=seconds,
        tokens_per_second=len(new) / seconds,
    )


def _prompt_ids(tokenizer: Any, prompt: str, raw: bool) -> Tensor:
    """int64 [1, tokens]."""
    if raw or not getattr(tokenizer, "chat_template", None):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids: Tensor = inputs["input_ids"]
    return ids
