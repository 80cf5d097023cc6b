"""llmq: weight-only quantization of causal language models, and packed weights served inside transformers.

The names below are the public API. Importing llmq is light: torch and transformers are loaded by the first verb used.
"""

from typing import TYPE_CHECKING, Any

from llmq.config import Calibration, QuantConfig
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from llmq.api import disable, enable, explain, load, preview, quantize

__all__ = [
    "Calibration",
    "LlmqError",
    "QuantConfig",
    "disable",
    "enable",
    "explain",
    "load",
    "preview",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llmq import api

        return getattr(api, name)
    raise AttributeError(f"module 'llmq' has no attribute {name!r}")
