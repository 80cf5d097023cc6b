"""Load quantized checkpoints into transformers with packed weights: `load`, `enable`, `disable`.

On disk a checkpoint names its format, and stock transformers would decompress it. There are two ways around that, neither
of which patches any code:

    load      reads the config, sets our quantizer ("llmq") in it and calls `from_pretrained` with it
    enable    replaces the config class of our formats in transformers' table, so that plain `from_pretrained` loads packed
              too; what llmq cannot run goes to the classes that were there before, by its config at once and by its
              files once the model's skeleton is known

The quantizer itself is in `llmq.hf.packed_quantizer`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from llmq.checkpoint.reader import open_checkpoint
from llmq.errors import LlmqError
from llmq.formats import FORMATS, unsupported_reason
from llmq.hf.model_class import model_class
from llmq.hf.packed_quantizer import OURS, STOCK_REMEDY, PackedConfig, PackedQuantizer
from llmq.hf.text_decoder import text_decoder
from llmq.serving.fused import fuse_linears, make_ready

# The arguments of from_pretrained that select the files.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder", "proxies")


def quantization_config_of(path: str | Path, **hub: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a folder or repo, whether or not `load` can run it; None if it has none.

    hub: as in `from_pretrained` (revision, token, ...). Raises transformers' OSError where no config can be read.
    """
    values, _ = PreTrainedConfig.get_config_dict(path, **hub)
    stored = values.get("quantization_config")
    return stored if isinstance(stored, dict) else None


def load(path: str | Path, kernel: str | None = None, fuse: bool = False, **kwargs: Any) -> Any:
    """Load a quantized checkpoint (folder or repo id) as a transformers model whose linears stay packed.

    kernel: the name of the only kernel to use (`llmq.kernels.registry`); None to choose by problem.
    fuse: run linears that read the same input as one matmul (`llmq.serving.fused`). Saving is not affected.
    kwargs: as in `AutoModelForCausalLM.from_pretrained` (dtype, by default the checkpoint's own; device_map, revision,
        ...). With `output_loading_info` a pair is returned.

    Raises `LlmqError` for a checkpoint that llmq cannot run, with the reason; for broken files, naming the tensor; and with
    `fuse` for offloaded weights and for linears with the same input that differ.
    """
    if "quantization_config" in kwargs:
        raise LlmqError("load takes no quantization_config: it reads the checkpoint's own")
    if Path(path).is_dir() and not kwargs.get("subfolder"):
        open_checkpoint(path, kwargs.get("variant"))  # its messages are clearer than those of transformers
    config, kwargs = _config_and_rest(path, kwargs)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, PackedConfig):
        stored = stored.stored
    if not isinstance(stored, dict):
        raise LlmqError(f"{path} is not quantized: load it with transformers.AutoModelForCausalLM.from_pretrained")
    reason = unsupported_reason(stored)
    if reason:
        raise LlmqError(f"llmq cannot run {path}: {reason}; {STOCK_REMEDY}")
    _register()
    config = copy.deepcopy(config)
    config.quantization_config = PackedConfig(stored, kernel, ready=not fuse)
    with_info = kwargs.pop("output_loading_info", False)
    arguments = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, **kwargs}
    if not arguments["trust_remote_code"]:
        _refuse_remote_code(path, config)
    built = model_class(config) or AutoModelForCausalLM
    model, info = built.from_pretrained(path, config=config, output_loading_info=True, **arguments)
    missing = sorted(info["missing_keys"])
    if missing:
        raise LlmqError(f"{path}: {missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
    if fuse:
        fuse_linears(model, text_decoder(model.config, model).module)
        make_ready(model)
    return (model, info) if with_info else model


def _config_and_rest(path: str | Path, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config, changed by those of `kwargs` that are its attributes, and all others, as `from_pretrained` does it."""
    kwargs = dict(kwargs)
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return config, kwargs
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    dtypes = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in hub}
    try:
        source = path if config is None else config
        config, rest = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **hub, **rest)
    except (OSError, ValueError) as error:
        raise LlmqError(f"{path} is not a model folder or repo: {str(error).splitlines()[0]}") from error
    trusted = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    return config, {**rest, **hub, **dtypes, **trusted}


def _refuse_remote_code(path: str | Path, config: PreTrainedConfig) -> None:
    """Raise `LlmqError` if only Python code in the checkpoint could build the model. It runs only if requested."""
    if model_class(config) is None:
        remedy = ", and the code in the checkpoint (auto_map) is run only with trust_remote_code=True"
        raise LlmqError(
            f"{path}: transformers has no causal language model for model_type {config.model_type!r}"
            + (remedy if hasattr(config, "auto_map") else "")
        )


def enable() -> None:
    """Make plain `AutoModelForCausalLM.from_pretrained` (pipelines, lm-eval, PEFT, ...) load packed.

    Checkpoints that llmq cannot run, among them other `compressed-tensors` schemes, load as before. `disable` undoes it.
    """
    _register()
    for name, stock in _registered_classes():
        if not hasattr(stock, "replaces"):
            AUTO_QUANTIZATION_CONFIG_MAPPING[name] = _dispatching(stock)


def disable() -> None:
    """Restore the classes that `enable` replaced."""
    for name, current in _registered_classes():
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = getattr(current, "replaces", current)


def _registered_classes() -> list[tuple[str, type]]:
    """The names of formats that transformers has a config class for too, with that class."""
    names = [each.name for each in FORMATS if each.name in AUTO_QUANTIZATION_CONFIG_MAPPING]
    return [(name, AUTO_QUANTIZATION_CONFIG_MAPPING[name]) for name in names]


def _register() -> None:
    AUTO_QUANTIZATION_CONFIG_MAPPING[OURS] = PackedConfig
    AUTO_QUANTIZER_MAPPING[OURS] = PackedQuantizer


def _dispatching(stock: type) -> type:
    """A subclass of `stock` that makes a packed config of configs that llmq may run, and a `stock` of all others."""

    class Packed(PackedConfig, stock):  # type: ignore[misc]
        """A `stock` too, so that transformers takes the loading attributes of one that is passed to `from_pretrained`."""

    Packed.__name__ = stock.__name__

    class Dispatching(stock):  # type: ignore[misc]
        replaces = stock

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if unsupported_reason(config_dict) is None:
                return Packed(config_dict, stock=stock)
            return cls.replaces.from_dict(config_dict, *args, **kwargs)  # type: ignore[attr-defined]

    return Dispatching
