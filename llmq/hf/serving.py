"""Quantized checkpoints inside transformers, packed: `load`, `enable` / `disable`, `explain`.

On disk a checkpoint says `compressed-tensors`; stock transformers would decompress it. Two ways around that, neither of
which patches anything:

    load      reads the config, names our own quantizer ("llmq") in it, and calls `from_pretrained` with it
    enable    puts a dispatching config class in the place of `compressed-tensors` in transformers' table, so that plain
              `from_pretrained` does the same; schemes that are not ours go on to the stock classes

Our quantizer overrides the process hooks alone (they are the same from 5.17 on): it puts a `QuantLinear` in the place of
every linear that the config names, on meta, after checking the files' headers against the shapes that the model implies,
since transformers loads a checkpoint with missing or misshaped packed tensors without an error. `to_dict` gives the
config back as it was read, so `save_pretrained` writes a standard checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint.reader import Checkpoint, open_checkpoint
from llmq.core.grid import Grid
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors as ct
from llmq.linear import QuantLinear

OURS = "llmq"
STOCK_CONFIG = AUTO_QUANTIZATION_CONFIG_MAPPING[ct.NAME]


@register_quantization_config(OURS)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` of ours, kept as it was read. kernel: force one kernel by name."""

    def __init__(self, stored: Mapping[str, Any], kernel: str | None = None) -> None:
        self.quant_method = OURS
        self.stored = {**stored, "quant_method": ct.NAME}
        self.kernel = kernel
        self.layout = ct.parse(self.stored)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        stored = {key: value for key, value in config_dict.items() if key != "kernel"}
        made = cls({**stored, "quant_method": ct.NAME}, config_dict.get("kernel"))
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.stored))  # type: ignore[no-any-return]

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(OURS)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `QuantLinear`s into a model before its weights are loaded, and checks them after."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent) if checkpoint_files else None
        replace_linears(model, self.quantization_config, checkpoint)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear) and module.weight_scale.device.type != "meta":
                _check_values(name, module)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def replace_linears(model: nn.Module, config: PackedConfig, checkpoint: Checkpoint | None) -> None:
    """Replace every linear that `config` quantizes by a `QuantLinear` on meta; check the headers of `checkpoint` first."""
    found = []
    for name, module in model.named_modules():
        classes = [base.__name__ for base in type(module).__mro__]
        grid = config.layout.grid_for(name, classes) if isinstance(module, nn.Linear) else None
        if grid is not None:
            found.append((name, module, grid))
    if not found:
        raise LlmqError("the quantization_config of this checkpoint matches no linear of the model")
    for name, module, grid in found:
        shape = (module.out_features, module.in_features)
        dtype = _check_headers(name, shape, grid, checkpoint) if checkpoint else module.weight.dtype
        bias = module.bias is not None
        made = QuantLinear(shape[1], shape[0], grid, dtype, bias, config.kernel, device="meta")
        model.set_submodule(name, made)


def _check_headers(name: str, shape: tuple[int, int], grid: Grid, checkpoint: Checkpoint) -> torch.dtype:
    """Raise `LlmqError` unless the files hold exactly the tensors of this linear; returns the scales' dtype."""
    stored = _stored_name(name, checkpoint)
    scale = checkpoint.tensors.get(f"{stored}.weight_scale")
    if scale is None:
        raise LlmqError(f"{checkpoint.folder}: {name}.weight_scale is missing")
    if not scale.dtype.is_floating_point or scale.dtype.itemsize < 2:
        raise LlmqError(f"{checkpoint.folder}: {stored}.weight_scale must be a 16- or 32-bit float; got {scale.dtype}")
    held = {
        key.rpartition(".")[2]: ct.TensorSpec(tensor.dtype, tuple(tensor.shape))
        for key, tensor in checkpoint.tensors.items()
        if key.startswith(f"{stored}.weight")
    }
    for local, spec in ct.specs(shape, grid, scale.dtype).items():
        got = held.pop(local, None)
        if got is None:
            raise LlmqError(f"{checkpoint.folder}: {stored}.{local} is missing")
        if got != spec:
            raise LlmqError(
                f"{checkpoint.folder}: {stored}.{local} must be {spec.dtype} {list(spec.shape)}; "
                f"got {got.dtype} {list(got.shape)}"
            )
    if held:
        raise LlmqError(f"{checkpoint.folder}: {stored}.{sorted(held)[0]} is not part of this scheme")
    return scale.dtype


def _stored_name(name: str, checkpoint: Checkpoint) -> str:
    """The module's name in the files: its own, or without the base model's prefix (transformers adds that at load)."""
    if f"{name}.weight_scale" in checkpoint.tensors:
        return name
    short = name.split(".", 1)[-1]
    return short if f"{short}.weight_scale" in checkpoint.tensors else name


def _check_values(name: str, module: QuantLinear) -> None:
    shape = module.weight_shape.tolist()
    if shape != [module.out_features, module.in_features]:
        raise LlmqError(f"{name}.weight_shape must be {[module.out_features, module.in_features]}; got {shape}")
    if not bool(torch.isfinite(module.weight_scale).all()) or bool((module.weight_scale == 0).any()):
        raise LlmqError(f"{name}.weight_scale holds NaN, inf or zero: the file is broken")


def is_quantized(path: str | Path, **kwargs: Any) -> bool:
    """Whether a folder or repo holds a checkpoint with a `quantization_config` that `load` runs."""
    config = AutoConfig.from_pretrained(path, **kwargs)
    stored = getattr(config, "quantization_config", None)
    return isinstance(stored, dict) and ct.foreign(stored) is None


def load(path: str | Path, kernel: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """A quantized checkpoint (folder or repo id) as a transformers model whose linears stay packed.

    kernel: force one kernel by name (`llmq.kernels.registry`). kwargs: as of `from_pretrained` (dtype, device_map, ...).
    Raises `LlmqError` for a checkpoint that is not ours to run, naming why, and for broken files, naming the tensor.
    """
    hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    try:
        config = AutoConfig.from_pretrained(path, **hub)
    except (OSError, ValueError) as error:
        raise LlmqError(f"{path} is not a model folder or repo: {str(error).splitlines()[0]}") from error
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict):
        raise LlmqError(f"{path} is not quantized: load it with AutoModelForCausalLM.from_pretrained")
    reason = ct.foreign(stored)
    if reason:
        raise LlmqError(f"{path}: not a checkpoint that llmq runs ({reason}); load it with AutoModelForCausalLM")
    config.quantization_config = {**stored, "quant_method": OURS, "kernel": kernel}
    model, info = AutoModelForCausalLM.from_pretrained(
        path, config=config, output_loading_info=True, use_safetensors=True, **kwargs
    )
    missing = [name for name in info["missing_keys"] if ".weight_" in name]
    if missing:
        raise LlmqError(f"{path}: {sorted(missing)[0]} is missing")
    return model


class _DispatchingConfig(STOCK_CONFIG):  # type: ignore[misc,valid-type]
    """In the place of transformers' own for `compressed-tensors`: ours for our schemes, the stock one for the rest."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        ours = ct.foreign(config_dict) is None
        return (PackedConfig if ours else STOCK_CONFIG).from_dict(config_dict, return_unused_kwargs, **kwargs)


def enable() -> None:
    """Make plain `AutoModelForCausalLM.from_pretrained` load our schemes packed. Undone by `disable`; idempotent."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[ct.NAME] = _DispatchingConfig


def disable() -> None:
    """Put transformers' own class back."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[ct.NAME] = STOCK_CONFIG


@dataclass(frozen=True)
class Explanation:
    """One row of `explain`: a linear, its grid in words, the kernel for one row of input and for many, and why not others."""

    name: str
    grid: str
    few_rows: str
    many_rows: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"{self.name}: {self.grid}; 1 row: {self.few_rows}; 512 rows: {self.many_rows}{why}"


def explain(model: nn.Module, dtype: torch.dtype | None = None) -> list[Explanation]:
    """Which kernel runs each quantized linear of `model`, and why not the ones before it. dtype: of activations."""
    stated = dtype or getattr(model, "dtype", None)
    kind = stated if isinstance(stated, torch.dtype) else torch.float32
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            few, many = module.choice(kind, 1), module.choice(kind, 512)
            reasons = dict(few.refused) | {k: v for k, v in many.refused if k not in dict(few.refused)}
            grid = f"int{module.grid.bits} g{module.grid.group_size or 'channel'}"
            told = tuple(f"{kernel} {why}" for kernel, why in reasons.items())
            rows.append(Explanation(name, grid, few.kernel.NAME, many.kernel.NAME, told))
    return rows
