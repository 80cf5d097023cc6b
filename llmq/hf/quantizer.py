"""Quantized checkpoints inside transformers, packed: `load`, `enable` / `disable`.

On disk a checkpoint says `compressed-tensors`; stock transformers would decompress it. Two ways around that, neither of
which patches any code:

    load      reads the config, names our own quantizer ("llmq") in it, and calls `from_pretrained` with it
    enable    puts a dispatching config class in the place of `compressed-tensors` in transformers' table, so that plain
              `from_pretrained` does the same; schemes that are not ours go on to the class that stood there

Our quantizer overrides the process hooks alone (they are the same from 5.17 on). Before loading it checks the files
(`llmq.hf.verify`) and puts `QuantLinear`s in the place of linears, on meta; after it, it checks values and lets kernels
make their layouts, but for what is offloaded. Its config's `to_dict` gives back what was read, so `save_pretrained` writes
a standard checkpoint.

Left out: repacking while loading (a WeightConverter; its interface changes from version to version), tensor parallelism,
and a choice of the dense route under `enable` (`disable` first).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint.reader import Checkpoint, open_checkpoint
from llmq.errors import LlmqError
from llmq.formats import FORMATS, IN_MEMORY, format_of, unsupported_reason
from llmq.formats.base import Format
from llmq.hf.text_decoder import text_decoder
from llmq.hf.verify import PackedLinear, find_linears
from llmq.serving.fused import fuse_linears, make_ready
from llmq.serving.linear import QuantLinear

OURS = "llmq"
# What of from_pretrained's arguments decides which files are meant.
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder", "proxies")


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` of ours, kept as it was read. kernel: force one kernel by name. ready: make the kernels'
    layouts at once.
    """

    def __init__(self, stored: Mapping[str, Any], kernel: str | None = None, ready: bool = True) -> None:
        self.quant_method = OURS
        self.stored = dict(stored)
        self.kernel, self.ready = kernel, ready
        stored_format = format_of(stored)
        if stored_format is None:
            raise LlmqError(f"llmq cannot run this checkpoint: {unsupported_reason(stored)}")
        self.format, self.layout = stored_format, stored_format.parse(stored)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = cls(config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict: transformers reads a model's own config, given for another load, as one."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `QuantLinear`s into a model before its weights are loaded; checks the files before, the values after."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent) if checkpoint_files else None
        config = self.quantization_config
        self._linears = find_linears(model, config.format, config.layout, self._checkpoint)
        for linear in self._linears:
            rows, columns = linear.shape
            module = QuantLinear(columns, rows, linear.scheme, linear.bias, config.kernel, "meta")
            model.set_submodule(linear.name, module)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        for linear in self._linears:
            module = model.get_submodule(linear.name)
            module.requires_grad_(False)  # which transformers asks for on every float that it loads
            # Offloaded tensors are on meta now; what will be brought in lies in the files.
            module.offloaded = module.weight_packed.device.type == "meta"
            _finish(module, linear, config.format, self._checkpoint if module.offloaded else None)
        for linear in self._linears:
            module = model.get_submodule(linear.name)
            if config.ready and not module.offloaded:
                module.ready(model.dtype)
        del self._checkpoint, self._linears
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: gradients flow through packed weights, not to them."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _finish(module: QuantLinear, linear: PackedLinear, stored_format: Format, checkpoint: Checkpoint | None) -> None:
    """Restore the scales' dtype and check values: those in memory, or in `checkpoint` where tensors are offloaded."""
    if checkpoint is not None:
        names = {local: f"{linear.stored}.{local}" for local in _checked(stored_format)}
        read = checkpoint.read(names.values())
        values = {local: read[name] for local, name in names.items()}
        stored_format.check_values(values, linear.shape, f"{linear.name}.")
    elif not module.offloaded:
        if module.weight_scale.dtype != linear.scheme.scale_dtype:  # the model keeps this part in float32
            module.weight_scale.data = module.weight_scale.data.to(linear.scheme.scale_dtype)
        values = {local: getattr(module, local) for local in _checked(IN_MEMORY)}
        IN_MEMORY.check_values(values, linear.shape, f"{linear.name}.")


def _checked(each: Format) -> tuple[str, ...]:
    """The local names of the tensors whose values are checked."""
    return (each.scale_name, *each.metadata_names)


def stored_scheme(path: str | Path, **hub: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a folder or repo, one that `load` refuses included; None where there is none."""
    values, _ = PreTrainedConfig.get_config_dict(path, **hub)
    stored = values.get("quantization_config")
    return stored if isinstance(stored, dict) else None


def load(path: str | Path, kernel: str | None = None, fuse: bool = False, **kwargs: Any) -> Any:
    """A quantized checkpoint (folder or repo id) as a transformers model whose linears stay packed.

    kernel: force one kernel by name (`llmq.kernels.registry`). fuse: run linears that read one input as one
    (`llmq.serving.fused`); the model is saved as without. kwargs: as of `AutoModelForCausalLM.from_pretrained`
    (dtype: the checkpoint's own by default; device_map, revision, ...); with `output_loading_info` a pair is returned.
    Raises `LlmqError` for a checkpoint that is not ours to run, naming why, for broken files, naming the tensor, and with
    `fuse` for offloaded weights and for linears of one input that differ.
    """
    if "quantization_config" in kwargs:
        raise LlmqError("quantization_config cannot be given: load reads the checkpoint's own")
    if Path(path).is_dir() and not kwargs.get("subfolder"):
        open_checkpoint(path)  # says what is wrong with the files more clearly than transformers does
    config = kwargs.pop("config", None) or _config(path, kwargs)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, PackedConfig):
        stored = stored.stored
    if not isinstance(stored, dict):
        raise LlmqError(f"{path} is not quantized: load it with transformers.AutoModelForCausalLM.from_pretrained")
    reason = unsupported_reason(stored)
    if reason:
        raise LlmqError(f"llmq cannot run {path}: {reason}; load it with transformers.AutoModelForCausalLM")
    _register()
    config = copy.deepcopy(config)
    config.quantization_config = PackedConfig(stored, kernel, ready=not fuse)
    wanted = kwargs.pop("output_loading_info", False)
    arguments = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, **kwargs}
    if not arguments["trust_remote_code"]:
        _refuse_remote_code(path, config)
    model, info = AutoModelForCausalLM.from_pretrained(path, config=config, output_loading_info=True, **arguments)
    missing = sorted(info["missing_keys"])
    if missing:
        raise LlmqError(f"{path}: {missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
    if fuse:
        fuse_linears(model, text_decoder(model.config, model).module)
        make_ready(model)
    return (model, info) if wanted else model


def _config(path: str | Path, kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    hub = {key: kwargs[key] for key in HUB if key in kwargs}
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code", False), **hub)
    except (OSError, ValueError) as error:
        raise LlmqError(f"{path} is not a model folder or repo: {str(error).splitlines()[0]}") from error


def _refuse_remote_code(path: str | Path, config: PreTrainedConfig) -> None:
    """Raise `LlmqError` where only code of the checkpoint itself could build the model; it is never run unasked."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        own = ", and the code in the checkpoint (auto_map) is run only with trust_remote_code=True"
        raise LlmqError(
            f"{path}: transformers has no causal language model for model_type {config.model_type!r}"
            + (own if hasattr(config, "auto_map") else "")
        )


def enable() -> None:
    """Make plain `AutoModelForCausalLM.from_pretrained` (pipelines, lm-eval, PEFT, ...) load our schemes packed.

    Everything else, other `compressed-tensors` schemes included, is loaded as before. Undone by `disable`; calling it
    twice is calling it once. While it holds, a `CompressedTensorsConfig` cannot be given for a checkpoint of ours.
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
    """A subclass of `stock` that makes a `PackedConfig` of configs that llmq runs, and a `stock` of all others."""

    class Dispatching(stock):  # type: ignore[misc]
        replaces = stock

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            supported = unsupported_reason(config_dict) is None
            return (PackedConfig if supported else cls.replaces).from_dict(config_dict, *args, **kwargs)  # type: ignore[attr-defined]

    return Dispatching
