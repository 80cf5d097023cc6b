"""compressed-tensors `pack-quantized`: what vLLM, SGLang, transformers and llama.cpp's converter read.

One linear of N outputs and K inputs, b bits, G groups per row, becomes (local names, `weight` replaced by)

    weight_packed       int32 [N, ceil(K * b / 32)]     unsigned codes along K, low bits first (llmq.core.packing)
    weight_scale        model dtype [N, G]              G = 1 per channel
    weight_zero_point   int32 [ceil(N * b / 32), G]     unsigned zeros packed along N; absent when symmetric
    weight_shape        int64 [2] = [N, K]

The format defines signed codes q - 2**(b-1) and stores them with that offset added, so what is stored are our unsigned
codes as they are. config.json's `quantization_config` says which modules are quantized and how: `config` writes it,
`parse` reads what we and llm-compressor write. Unknown keys inside a group would make the library refuse the file, so
provenance never goes there.

Left out: g_idx (removed from the format in 2026), per-tensor scales, activations, other number formats: `parse` says
which of them it met, and such a checkpoint is left to the stock loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.core.grid import Grid
from llmq.core.packing import pack, packed_width, unpack
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError

NAME = "compressed-tensors"
BITS = (2, 3, 4, 8)
SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """A parsed `quantization_config`: which modules are quantized, and on which grid.

    groups: (targets, grid) in file order; a target is a module name, a class name or `re:REGEX`.
    ignore: the same kinds of pattern, for modules that stay dense.
    """

    groups: tuple[tuple[tuple[str, ...], Grid], ...]
    ignore: tuple[str, ...]

    def grid_for(self, name: str, classes: Sequence[str]) -> Grid | None:
        """The grid of the module `name` whose class and base classes are called `classes`; None where it stays dense.

        A target by name or regex is more specific than one by class and wins, as in vLLM and compressed-tensors.
        """
        if any(matches(pattern, name, classes) for pattern in self.ignore):
            return None
        for by_name in (True, False):
            for targets, grid in self.groups:
                if any(matches(t, name, () if by_name else classes) for t in targets):
                    return grid
        return None


def matches(pattern: str, name: str, classes: Iterable[str]) -> bool:
    """Whether a compressed-tensors pattern means this module: its exact name, one of its class names, or `re:REGEX`.

    The regex is anchored at the start only, as `re.match` is.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name or pattern in classes


def specs(shape: tuple[int, int], grid: Grid, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """What `encode` will return for a weight of `shape` [N, K] with scales in `dtype`, without any data."""
    rows, columns = shape
    groups = columns // grid.columns_per_group(columns)
    found = {
        "weight_packed": TensorSpec(torch.int32, (rows, packed_width(columns, grid.bits))),
        "weight_scale": TensorSpec(dtype, (rows, groups)),
        "weight_shape": TensorSpec(torch.int64, (2,)),
    }
    if not grid.symmetric:
        found["weight_zero_point"] = TensorSpec(torch.int32, (packed_width(rows, grid.bits), groups))
    return found


def encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of a quantized weight, under their local names."""
    if weight.scale.shape[0] != weight.shape[0]:
        raise LlmqError("pack-quantized holds scales per group or per channel, not per tensor")
    tensors = {
        "weight_packed": pack(weight.codes, weight.bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        tensors["weight_zero_point"] = pack(weight.zero.T.contiguous(), weight.bits).T.contiguous()
    return tensors


def decode(tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
    """The quantized weight that stored tensors (local names) hold; the inverse of `encode`.

    N comes from `weight_packed`, K from `weight_shape`. Raises `LlmqError` where dtypes or shapes disagree with `grid`.
    """
    rows, columns = (int(size) for size in tensors["weight_shape"])
    expected = specs((rows, columns), grid, tensors["weight_scale"].dtype)
    check(tensors, expected)
    zero = None
    if not grid.symmetric:
        zero = unpack(tensors["weight_zero_point"].T.contiguous(), grid.bits, rows).T.contiguous()
    codes = unpack(tensors["weight_packed"], grid.bits, columns)
    return QuantizedWeight(codes, tensors["weight_scale"], zero, grid.columns_per_group(columns), grid.bits)


def check(tensors: Mapping[str, Tensor], expected: Mapping[str, TensorSpec], prefix: str = "") -> None:
    """Raise `LlmqError`, naming the tensor (with `prefix`), unless exactly the `expected` ones are there."""
    for name in sorted(set(tensors) | set(expected)):
        if name not in tensors:
            raise LlmqError(f"{prefix}{name} is missing")
        if name not in expected:
            raise LlmqError(f"{prefix}{name} is not part of this scheme")
        tensor, spec = tensors[name], expected[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise LlmqError(
                f"{prefix}{name} must be {spec.dtype} {list(spec.shape)}; got {tensor.dtype} {list(tensor.shape)}"
            )


def config(grids: Mapping[str, Grid], ignore: Sequence[str], ordered: bool) -> dict[str, Any]:
    """The `quantization_config` of a model whose linears `grids` (module name -> grid) are quantized.

    ignore: the names of every linear that is not. ordered: whether columns were rounded in activation order (recorded
    as `actorder: weight`; engines need nothing for it). One grid for all becomes one group with target `Linear`;
    several become one group each, whose targets are names, shortened to a regex on the last part where that is exact.
    """
    by_grid: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        by_grid.setdefault(grid, []).append(name)
    groups = {}
    for index, (grid, names) in enumerate(by_grid.items()):
        targets = ["Linear"] if len(by_grid) == 1 else _targets(names, grids)
        groups[f"group_{index}"] = {
            "targets": targets,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
            "weights": _weights(grid, ordered),
        }
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": groups,
    }


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


def _targets(names: Sequence[str], grids: Mapping[str, Grid]) -> list[str]:
    """Patterns that match exactly `names` among all of `grids`."""
    mine, targets = set(names), []
    for last in dict.fromkeys(name.rpartition(".")[2] for name in names):
        pattern = rf"re:.*\.{re.escape(last)}$"
        matched = {name for name in grids if matches(pattern, name, ())}
        if matched and matched <= mine:
            targets.append(pattern)
            mine -= matched
    return targets + [name for name in names if name in mine]


def foreign(quantization_config: Mapping[str, Any]) -> str | None:
    """Why a `quantization_config` is not one of ours to run; None where it is.

    Ours is: pack-quantized integers at a width in `BITS`, per group or per channel, no quantized activations.
    """
    if quantization_config.get("quant_method") != NAME:
        return f"quant_method is {quantization_config.get('quant_method')!r}, not {NAME!r}"
    if quantization_config.get("quantization_status") != "compressed":
        return f"quantization_status is {quantization_config.get('quantization_status')!r}, not 'compressed'"
    groups = quantization_config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return "it has no config_groups"
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantization_config.get(key):
            return f"it has a {key}"
    for name, group in groups.items():
        reason = _foreign_group(group, quantization_config.get("format"))
        if reason:
            return f"{name}: {reason}"
    return None


def _foreign_group(group: Any, default_format: Any) -> str | None:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        return "its weights are not quantized"
    weights = group["weights"]
    layout = group.get("format") or default_format
    if layout != "pack-quantized":
        return f"format is {layout!r}, not 'pack-quantized'"
    if group.get("input_activations") or group.get("output_activations"):
        return "activations are quantized"
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        return "weights are not static integers"
    if weights.get("strategy") not in ("group", "channel"):
        return f"strategy is {weights.get('strategy')!r}, not 'group' or 'channel'"
    if weights.get("actorder") in ("group", "dynamic", True):
        return "columns are stored in activation order (g_idx)"
    if weights.get("num_bits") not in BITS:
        return f"num_bits is {weights.get('num_bits')!r}, not one of {BITS}"
    return None


def parse(quantization_config: Mapping[str, Any]) -> Layout:
    """The layout that a `quantization_config` describes. Raises `LlmqError` where `foreign` has a reason."""
    reason = foreign(quantization_config)
    if reason:
        raise LlmqError(f"not a checkpoint that llmq runs: {reason}")
    groups = []
    for name, group in quantization_config["config_groups"].items():
        weights, targets = group["weights"], group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise LlmqError(f"quantization_config.{name}.targets must be a list of strings; got {targets!r}")
        size = weights.get("group_size") if weights["strategy"] == "group" else None
        if weights["strategy"] == "group" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise LlmqError(f"quantization_config.{name}.group_size must be a positive integer; got {size!r}")
        groups.append((tuple(targets), Grid(weights["num_bits"], size, bool(weights.get("symmetric", True)))))
    ignore = quantization_config.get("ignore") or []
    _check_patterns([*ignore, *(target for targets, _ in groups for target in targets)])
    return Layout(tuple(groups), tuple(ignore))


def _check_patterns(patterns: Sequence[Any]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise LlmqError(f"quantization_config patterns must be strings; got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise LlmqError(f"quantization_config has a broken regex {pattern!r}: {error}") from None
