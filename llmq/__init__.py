"""llmq: weight-only quantization of causal language models, and packed weights served inside transformers.

The names below are the public API. Importing llmq is light: torch and transformers are loaded by the first verb used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmq._version import __version__
from llmq.config import Calibration, QuantConfig
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from llmq.api import preview, quantize
    from llmq.hf.decoding import generate_fast
    from llmq.hf.serving import disable, enable, load
    from llmq.launches import explain, warmup

__all__ = [
    "Calibration",
    "LlmqError",
    "QuantConfig",
    "__version__",
    "disable",
    "enable",
    "explain",
    "generate_fast",
    "load",
    "preview",
    "quantize",
    "warmup",
]

_VERBS = {
    "llmq.api": ("preview", "quantize"),
    "llmq.hf.decoding": ("generate_fast",),
    "llmq.hf.serving": ("disable", "enable", "load"),
    "llmq.launches": ("explain", "warmup"),
}


def __getattr__(name: str) -> Any:
    for module, verbs in _VERBS.items():
        if name in verbs:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'llmq' has no attribute {name!r}")
