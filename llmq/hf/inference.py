"""Models opened whole for inference, plain or quantized, with their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TextStreamer

from llmq.hf.quantizer import load, quantization_config_of
from llmq.hf.sidefiles import load_tokenizer
from llmq.hf.source import open_source
from llmq.hf.source_base import quiet


def open_model(source: Any, dtype: str, device: str = "cpu", revision: str | None = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder, repo id or GGUF file, plain or quantized.

    dtype: of every floating tensor but the scales of packed weights.
    device: weights are loaded onto it directly, so that packed layouts are made there only.
    Raises `LlmqError` if there is no such model, if it cannot be run, or if it has no tokenizer.
    """
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    if _is_packed(source, hub):
        placed: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
        with quiet():
            model = load(source, dtype=dtype, **placed, **hub)
            return model.eval(), load_tokenizer(source, **hub)
    opened = open_source(source, dtype=dtype, device=device, revision=revision)
    opened.load_outer()
    for index in range(len(opened)):
        opened.load_block(index)
    return opened.model.eval(), opened.tokenizer()


def stdout_streamer(tokenizer: Any) -> Any:
    """A streamer for `generate` that prints new text to stdout as it is generated."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _is_packed(source: Any, hub: dict[str, Any]) -> bool:
    """Whether a folder or repo is quantized; `load` then reports why it cannot be run, `open_source` other problems."""
    if not isinstance(source, (str, Path)) or str(source).endswith(".gguf"):
        return False
    try:
        with quiet():
            return quantization_config_of(source, **hub) is not None
    except (OSError, ValueError):
        return False
