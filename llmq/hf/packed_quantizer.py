"""Our quantizer: it puts packed linears into a model while transformers loads it.

It overrides only hooks that are unchanged since transformers 5.17. Before loading it checks the files
(`llmq.hf.verify`) and replaces linears by `QuantLinear`s on meta. After loading it checks values and makes the kernels'
layouts, except for offloaded weights. Its config's `to_dict` returns what was read, so `save_pretrained` writes a
standard checkpoint; linears that became dense or are new are added to `ignore` there.

Left out: repacking while loading (a WeightConverter, whose interface changes from version to version) and tensor
parallelism.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint.reader import Checkpoint, open_files
from llmq.errors import LlmqError
from llmq.formats import IN_MEMORY, format_of, unsupported_reason
from llmq.formats.base import Format
from llmq.hf.experts import without_merging
from llmq.hf.verify import NotOurs, PackedLinear, find_linears
from llmq.serving.linear import QuantLinear

OURS = "llmq"
STOCK_REMEDY = "load it with transformers' from_pretrained"


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` that llmq runs. Raises `LlmqError` for any other.

    stored: the config as it was read, which `to_dict` returns.
    kernel: the name of the only kernel to use; None to choose by problem.
    ready: whether to make the kernels' layouts right after loading.
    stock: the config class of another quantizer, which is given the checkpoints that turn out not to be ours.
    format, layout: the format that `stored` names, and which modules it quantizes.
    dequantize: whether the caller of `from_pretrained` asked for dense weights, with a config of the stock class.
    """

    def __init__(
        self, stored: Mapping[str, Any], kernel: str | None = None, ready: bool = True, stock: type | None = None
    ) -> None:
        self.quant_method = OURS
        self.stored = dict(stored)
        self.kernel, self.ready, self.stock = kernel, ready, stock
        self.dequantize = False
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

    def ignore(self, name: str) -> None:
        """Record that the linear `name` is dense."""
        self.stored["ignore"] = [*(self.stored.get("ignore") or []), name]
        self.layout = self.format.parse(self.stored)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `QuantLinear`s into a model before its weights are loaded. Checks the files before, and values after.

    A model that `llmq.hf.verify` cannot run packed is handed on to the stock quantizer, if there is one: from then on
    this object, which `from_pretrained` holds, is a stock quantizer.
    """

    requires_calibration = True

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise LlmqError("llmq does not quantize while loading: write a checkpoint with llmq.quantize and load that")
        super().__init__(quantization_config, **kwargs)
        if quantization_config.stock is not None and quantization_config.dequantize:
            self._become_stock()

    def preprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        try:
            self._checkpoint = _opened(kwargs.get("checkpoint_files"))
            if getattr(model.config, "distributed_config", None) is not None:
                raise NotOurs("packed weights are not split over devices")
            self._linears = find_linears(model, config.format, config.layout, self._checkpoint)
        except NotOurs as reason:
            if config.stock is None:
                raise LlmqError(f"llmq cannot run this checkpoint packed: {reason}; {STOCK_REMEDY}") from None
            warnings.warn(f"llmq leaves this checkpoint to transformers' own loader: {reason}", stacklevel=2)
            self._become_stock()
            self.preprocess_model(model, **kwargs)
            return
        super().preprocess_model(model, **kwargs)

    def _become_stock(self) -> None:
        config = self.quantization_config
        stock_config = config.stock.from_dict(copy.deepcopy(config.stored))
        for name in ("dequantize", "use_optimized_inference"):
            if hasattr(stock_config, name):
                setattr(stock_config, name, getattr(config, name, False))
        stock = AUTO_QUANTIZER_MAPPING[config.stored["quant_method"]](stock_config, pre_quantized=True)
        stock.validate_environment(device_map=None, weights_only=True)
        self.__class__, self.__dict__ = type(stock), vars(stock)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for linear in self._linears:
            rows, columns = linear.shape
            module = QuantLinear(columns, rows, linear.scheme, linear.bias, self.quantization_config.kernel, "meta")
            module.dense_dtype = model.dtype
            model.set_submodule(linear.name, module)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Packed experts are loaded one by one: nothing merges them."""
        stored = [linear.stored for linear in self._linears]
        updated: list[Any] = super().update_weight_conversions(without_merging(weight_conversions, stored), *model)
        return updated

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        _cast_renamed(model, self._dtypes)
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
        del self._checkpoint, self._linears, self._dtypes
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Make every packed linear dense, in the model's dtype or another, to which the whole model is then cast."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        for name, linear in linears.items():
            if linear.offloaded:
                raise LlmqError(f"{name} is offloaded and cannot be dequantized: load the model without offloading")
        for linear in linears.values():
            linear.make_dense(linear.dequantize(dtype))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        return model.to(dtype) if dtype != model.dtype else model

    def get_quantize_ops(self) -> Any:
        raise LlmqError("llmq does not quantize while loading: write a checkpoint with llmq.quantize and load that")

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Before saving: linears that became dense, or are new, are added to the config's `ignore`."""
        config = self.quantization_config
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not isinstance(module, QuantLinear):
                classes = [base.__name__ for base in type(module).__mro__]
                if config.layout.scheme_for(name, classes, torch.float32) is not None:
                    config.ignore(name)
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True for adapters: gradients flow through packed weights, not to them."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _opened(files: list[str] | None) -> Checkpoint | None:
    """The checkpoint of the files that transformers will load; None without files. Raises `NotOurs` for pickles."""
    if not files:
        return None
    if not all(str(file).endswith(".safetensors") for file in files):
        raise NotOurs(f"{Path(files[0]).name} is not in safetensors")
    return open_files(files)


def _cast_renamed(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast what was loaded in another dtype than the model was built in: transformers 5.17 leaves tensors as they are
    stored whose names it changes, if a quantizer is active. What a model keeps in float32 stays as it is."""
    kept = [re.compile(glob.replace("*", ".*")) for glob in model._get_dtype_plan(model.dtype)]
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name, parameter.dtype)
        if parameter.dtype != wanted and parameter.is_floating_point() and not any(each.search(name) for each in kept):
            parameter.data = parameter.data.to(wanted)


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
