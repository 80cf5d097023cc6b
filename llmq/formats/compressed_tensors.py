"""compressed-tensors `pack-quantized`, the format that vLLM, SGLang, transformers and llama.cpp's converter read.

A linear of N outputs and K inputs at b bits with G groups per row is stored as (local names, in place of `weight`)

    weight_packed       int32 [N, ceil(K * b / 32)]     unsigned codes along K, low bits first (llmq.core.packing)
    weight_scale        model dtype [N, G]              G = 1 per channel
    weight_zero_point   int32 [ceil(N * b / 32), G]     unsigned zeros packed along N; absent when symmetric
    weight_shape        int64 [2] = [N, K]

The format defines signed codes q - 2**(b-1) and stores them with that offset added, which gives exactly our unsigned
codes. config.json's `quantization_config` says which modules are quantized and how: `config` writes it, `parse` reads
what we and llm-compressor write. The library refuses a file with unknown keys inside a group, so provenance is never
written there.

Left out: g_idx (removed from the format in 2026), per-tensor scales, activations, other number formats.
`unsupported_reason` names which of them a checkpoint has, and such a checkpoint is left to the stock loader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.core.grid import Grid
from llmq.core.packing import pack, packed_width, unpack
from llmq.core.quantized import QuantizedWeight
from llmq.core.scheme import Scheme, scheme_of
from llmq.errors import LlmqError
from llmq.formats.base import Format, Layout, LayoutGroup, TensorSpec, check_specs, matches, spec_of

BITS = (2, 3, 4, 8)
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CompressedTensors(Format):
    """See the module's docstring for the layout."""

    name = "compressed-tensors"
    tensor_names = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    scale_name = "weight_scale"
    metadata_names = ("weight_shape",)
    reserved_names = (*tensor_names, "weight_g_idx")

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def refusal(self, scheme: Scheme) -> str | None:
        if scheme.activation is not None:
            return f"pack-quantized stores no quantized activations; the scheme asks for {scheme.activation}"
        if scheme.weight.bits not in BITS:
            return f"stores weights of {', '.join(map(str, BITS))} bits; got {scheme.weight.bits}"
        if scheme.scale_dtype not in SCALE_DTYPES:
            return f"stores scales in {', '.join(map(str, SCALE_DTYPES))}; got {scheme.scale_dtype}"
        return None

    def specs(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        self.require(scheme)
        grid, (rows, columns) = scheme.weight, shape
        groups = columns // grid.columns_per_group(columns)
        specs = {
            "weight_packed": TensorSpec(torch.int32, (rows, packed_width(columns, grid.bits))),
            "weight_scale": TensorSpec(scheme.scale_dtype, (rows, groups)),
            "weight_shape": TensorSpec(torch.int64, (2,)),
        }
        if not grid.symmetric:
            specs["weight_zero_point"] = TensorSpec(torch.int32, (packed_width(rows, grid.bits), groups))
        return specs

    def encode(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.require(scheme_of(weight))
        tensors = {
            "weight_packed": pack(weight.codes, weight.bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zero is not None:
            tensors["weight_zero_point"] = pack(weight.zero.T.contiguous(), weight.bits).T.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        if "weight_shape" not in tensors:
            raise LlmqError("weight_shape is missing")
        rows, columns = (int(size) for size in tensors["weight_shape"])
        check_specs({name: spec_of(tensor) for name, tensor in tensors.items()}, self.specs((rows, columns), scheme))
        grid, zero = scheme.weight, None
        if not grid.symmetric:
            zero = unpack(tensors["weight_zero_point"].T.contiguous(), grid.bits, rows).T.contiguous()
        codes = unpack(tensors["weight_packed"], grid.bits, columns)
        return QuantizedWeight(codes, tensors["weight_scale"], zero, grid.columns_per_group(columns), grid.bits)

    def check_values(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], prefix: str = "") -> None:
        stated = tensors["weight_shape"].tolist()
        if stated != list(shape):
            raise LlmqError(f"{prefix}weight_shape must be {list(shape)}, the shape in the model; got {stated}")
        scale = tensors["weight_scale"]
        if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
            raise LlmqError(
                f"{prefix}weight_scale holds NaN, inf or zero: the file is broken; download or write it again"
            )

    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str], ordered: bool) -> dict[str, Any]:
        """As `Format.config`. `ordered` is recorded as `actorder: weight`, which engines need nothing for.

        One grid for all linears becomes one group with the target `Linear`. Several grids become one group each, whose
        targets are module names, shortened to a regex on the last part of the name where that is exact.
        """
        by_grid: dict[Grid, list[str]] = {}
        for name, scheme in schemes.items():
            self.require(scheme)
            by_grid.setdefault(scheme.weight, []).append(name)
        groups = {}
        for index, (grid, names) in enumerate(by_grid.items()):
            targets = ["Linear"] if len(by_grid) == 1 else _targets(names, list(schemes))
            groups[f"group_{index}"] = {
                "targets": targets,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
                "weights": _weights(grid, ordered),
            }
        return {
            "quant_method": self.name,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "config_groups": groups,
        }

    def unsupported_reason(self, quantization_config: Mapping[str, Any]) -> str | None:
        """As `Format.unsupported_reason`.

        Supported: pack-quantized integers at a width in `BITS`, per group or per channel, no quantized activations.
        """
        if quantization_config.get("quant_method") != self.name:
            return f"quant_method is {quantization_config.get('quant_method')!r}, not {self.name!r}"
        if quantization_config.get("quantization_status") != "compressed":
            return f"quantization_status is {quantization_config.get('quantization_status')!r}, not 'compressed'"
        groups = quantization_config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            return "it has no config_groups"
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            value = quantization_config.get(key)
            if value and not (key == "sparsity_config" and _changes_nothing(value)):
                return f"it has a {key}"
        for name, group in groups.items():
            reason = _unsupported_group(group, quantization_config.get("format"))
            if reason:
                return f"{name}: {reason}"
        return None

    def parse(self, quantization_config: Mapping[str, Any]) -> Layout:
        reason = self.unsupported_reason(quantization_config)
        if reason:
            raise LlmqError(f"llmq cannot run this checkpoint: {reason}")
        groups = tuple(_group(name, group) for name, group in quantization_config["config_groups"].items())
        ignore = quantization_config.get("ignore") or []
        _check_patterns([*ignore, *(target for group in groups for target in group.targets)])
        return Layout(groups, tuple(ignore))


def _weights(grid: Grid, ordered: bool) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": "weight" if ordered else None,
        "observer": "minmax",
    }


def _targets(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """Patterns that match exactly `names` among `all_names`."""
    remaining, targets = set(names), []
    for last in dict.fromkeys(name.rpartition(".")[2] for name in names):
        pattern = rf"re:.*\.{re.escape(last)}$"
        matched = {name for name in all_names if matches(pattern, name, ())}
        if matched and matched <= remaining:
            targets.append(pattern)
            remaining -= matched
    return targets + [name for name in names if name in remaining]


def _unsupported_group(group: Any, default_format: Any) -> str | None:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        return "its weights are not quantized"
    weights = group["weights"]
    stored_as = group.get("format") or default_format
    if stored_as != "pack-quantized":
        return f"format is {stored_as!r}, not 'pack-quantized'"
    if group.get("input_activations") or group.get("output_activations"):
        return "activations are quantized"
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        return "weights are not static integers"
    if _strategy(weights) not in ("group", "channel"):
        return f"strategy is {_strategy(weights)!r}, not 'group' or 'channel'"
    if weights.get("actorder") in ("group", "dynamic", True):
        return "columns are stored in activation order (g_idx)"
    if weights.get("num_bits") not in BITS:
        return f"num_bits is {weights.get('num_bits')!r}, not one of {BITS}"
    return None


def _changes_nothing(sparsity: Any) -> bool:
    """Whether a `sparsity_config` only records how sparse a dense checkpoint is."""
    return isinstance(sparsity, Mapping) and sparsity.get("format") in (None, "dense")


def _strategy(weights: Mapping[str, Any]) -> Any:
    """The strategy; where it is absent, compressed-tensors infers it from group_size, and -1 means one per channel."""
    stated, size = weights.get("strategy"), weights.get("group_size")
    if stated is not None:
        return stated
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _group(name: str, group: Mapping[str, Any]) -> LayoutGroup:
    weights, targets = group["weights"], group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise LlmqError(f"quantization_config.{name}.targets must be a list of strings; got {targets!r}")
    size = weights.get("group_size") if _strategy(weights) == "group" else None
    if _strategy(weights) == "group" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise LlmqError(f"quantization_config.{name}.group_size must be a positive integer; got {size!r}")
    return LayoutGroup(tuple(targets), Grid(weights["num_bits"], size, bool(weights.get("symmetric", True))))


def _check_patterns(patterns: Sequence[Any]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise LlmqError(f"quantization_config patterns must be strings; got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise LlmqError(f"quantization_config has a broken regex {pattern!r}: {error}") from None
