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
    from llmq.hf.generation import generate_fast
    from llmq.hf.quantizer import disable, enable, load
    from llmq.serving.dispatch import explain, warmup
    from llmq.serving.linear import QuantLinear

__all__ = [
    "Calibration",
    "LlmqError",
    "QuantConfig",
    "QuantLinear",
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
    "llmq.hf.generation": ("generate_fast",),
    "llmq.hf.quantizer": ("disable", "enable", "load"),
    "llmq.serving.dispatch": ("explain", "warmup"),
    "llmq.serving.linear": ("QuantLinear",),
}


def __getattr__(name: str) -> Any:
    for module, verbs in _VERBS.items():
        if name in verbs:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'llmq' has no attribute {name!r}")
