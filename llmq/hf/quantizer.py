"""Load quantized checkpoints into transformers with packed weights: `load`, `enable`, `disable`.

On disk a checkpoint names its format, and stock transformers would decompress it. There are two ways around that, neither
of which patches any code:

    load      reads the config, sets our quantizer ("llmq") in it and calls `from_pretrained` with it
    enable    replaces the config class of our formats in transformers' table, so that plain `from_pretrained` loads packed
              too; configs that llmq cannot run are passed on to the class that was there before

Our quantizer overrides only the process hooks (unchanged since transformers 5.17). Before loading it checks the files
(`llmq.hf.verify`) and replaces linears by `QuantLinear`s on meta. After loading it checks values and makes the kernels'
layouts, except for offloaded weights. Its config's `to_dict` returns what was read, so `save_pretrained` writes a standard
checkpoint.

Left out: repacking while loading (a WeightConverter, whose interface changes from version to version), tensor
parallelism, and loading dense under `enable` (call `disable` first).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint.reader import Checkpoint, open_checkpoint
from llmq.errors import LlmqError
from llmq.formats import FORMATS, IN_MEMORY, format_of, unsupported_reason
from llmq.formats.base import Format
from llmq.hf.experts import without_merging
from llmq.hf.model_class import model_class
from llmq.hf.text_decoder import text_decoder
from llmq.hf.verify import PackedLinear, find_linears
from llmq.serving.fused import fuse_linears, make_ready
from llmq.serving.linear import QuantLinear

OURS = "llmq"
# The arguments of from_pretrained that select the files.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder", "proxies")


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` that llmq runs. Raises `LlmqError` for any other.

    stored: the config as it was read, which `to_dict` returns.
    kernel: the name of the only kernel to use; None to choose by problem.
    ready: whether to make the kernels' layouts right after loading.
    format, layout: the format that `stored` names, and which modules it quantizes.
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
        config = cls(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`: transformers treats a loaded model's config, passed to another load, as a dict."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `QuantLinear`s into a model before its weights are loaded. Checks the files before, and values after."""

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

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Packed experts are loaded one by one: nothing merges them."""
        stored = [linear.stored for linear in self._linears]
        updated: list[Any] = super().update_weight_conversions(without_merging(weight_conversions, stored), *model)
        return updated

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        for linear in self._linears:
            module = model.get_submodule(linear.name)
            module.requires_grad_(False)  # transformers sets it on every floating tensor that it loads
            # Offloaded tensors are on meta now; their data is in the files.
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
        """True for adapters: gradients flow through packed weights, not to them."""
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
        open_checkpoint(path)  # its messages about broken files are clearer than those of transformers
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


def _config(path: str | Path, kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code", False), **hub)
    except (OSError, ValueError) as error:
        raise LlmqError(f"{path} is not a model folder or repo: {str(error).splitlines()[0]}") from error


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
    Calling it twice has no further effect. While enabled, `from_pretrained` accepts no `CompressedTensorsConfig` for a
    checkpoint that llmq runs.
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
