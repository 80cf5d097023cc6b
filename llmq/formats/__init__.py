"""On-disk formats, one per file. `FORMATS` registers them; `llmq.formats.base` declares what a format is.

In memory there is one layout of packed weights (`llmq.kernels.problem.Packed`), that of `IN_MEMORY`: a packed linear
holds its tensors under its names. Other formats convert when a checkpoint is read or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmq.errors import LlmqError
from llmq.formats.base import Format
from llmq.formats.compressed_tensors import CompressedTensors

FORMATS: tuple[Format, ...] = (CompressedTensors(),)


def format_named(name: str) -> Format:
    """The format called `name`. Raises `LlmqError` for any other name."""
    for each in FORMATS:
        if each.name == name:
            return each
    raise LlmqError(f"format must be one of {', '.join(each.name for each in FORMATS)}; got {name!r}")


def format_of(quantization_config: Mapping[str, Any]) -> Format | None:
    """The format that a `quantization_config` names, whether or not llmq can run it; None for an unknown one."""
    return next((each for each in FORMATS if each.name == quantization_config.get("quant_method")), None)


def unsupported_reason(quantization_config: Mapping[str, Any]) -> str | None:
    """Why llmq cannot run a checkpoint with this `quantization_config`, as a clause; None if it can."""
    stored_format = format_of(quantization_config)
    if stored_format is None:
        known = ", ".join(repr(each.name) for each in FORMATS)
        return f"quant_method is {quantization_config.get('quant_method')!r}, not {known}"
    return stored_format.unsupported_reason(quantization_config)


IN_MEMORY: Format = format_named("compressed-tensors")
"""The format whose tensors packed linears hold, so that they are saved without conversion."""

DEFAULT_FORMAT: Format = format_named("compressed-tensors")
"""The format in which `quantize` writes."""
