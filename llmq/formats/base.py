"""The interface of an on-disk format, and the values that cross it.

A format converts between `QuantizedWeight` and the named tensors of a checkpoint, and between the schemes of a model and
config.json's `quantization_config`. It never sees a method, a model or a file. Its tensors have local names: the full
name of `weight_packed` in the linear `model.layers.0.mlp.up_proj` is that module's name, a dot and `weight_packed`.

To add a format: write one file with a subclass of `Format` and add an instance to `llmq.formats.FORMATS`. The contract
tests in tests/test_formats.py run over that tuple.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight
from llmq.core.scheme import ActivationGrid, Scheme
from llmq.errors import LlmqError


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class LayoutGroup:
    """Modules that share one scheme."""

    targets: tuple[str, ...]
    """Patterns (see `matches`) of the modules."""
    weight: Grid
    """The grid of their weights."""
    activation: ActivationGrid | None = None
    """The grid of their inputs; None where inputs are not quantized."""


@dataclass(frozen=True)
class Layout:
    """A parsed `quantization_config`: which modules are quantized, and how."""

    groups: tuple[LayoutGroup, ...]
    """In file order; the first that matches wins."""
    ignore: tuple[str, ...]
    """Patterns (see `matches`) of modules that stay dense."""

    def scheme_for(self, name: str, classes: Sequence[str], scale_dtype: torch.dtype) -> Scheme | None:
        """The scheme of the module `name`; None if it stays dense.

        classes: the names of the module's class and base classes. scale_dtype: the scheme's, which no config states.
        A target by name or regex is more specific than one by class and wins, as in vLLM and compressed-tensors.
        """
        if any(matches(pattern, name, classes) for pattern in self.ignore):
            return None
        for names_only in (True, False):
            for group in self.groups:
                if any(matches(target, name, () if names_only else classes) for target in group.targets):
                    return Scheme(group.weight, group.activation, scale_dtype)
        return None


def matches(pattern: str, name: str, classes: Iterable[str]) -> bool:
    """Whether a pattern selects a module: its exact name, the name of one of its classes, or `re:REGEX`.

    The regex must match at the start of the name and need not reach its end, as with `re.match`. These are the patterns
    of compressed-tensors.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name or pattern in classes


def spec_of(tensor: Tensor) -> TensorSpec:
    """The spec of an existing tensor."""
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def check_specs(found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec], prefix: str = "") -> None:
    """Raise `LlmqError` unless `found` equals `expected`. The message names the tensor, with `prefix` before it."""
    for name in sorted(set(found) | set(expected)):
        if name not in found:
            raise LlmqError(f"{prefix}{name} is missing")
        if name not in expected:
            raise LlmqError(f"{prefix}{name} is not part of this scheme")
        if found[name] != expected[name]:
            raise LlmqError(f"{prefix}{name} must be {expected[name]}; got {found[name]}")


class Format(ABC):
    """One on-disk format. Instances hold no state; `llmq.formats.FORMATS` lists them."""

    name: str
    """The `quant_method` in config.json. Unique among the formats."""
    tensor_names: tuple[str, ...]
    """Every local name that `encode` may return."""
    scale_name: str
    """The local name of the scales. Their stored dtype is the scheme's `scale_dtype`."""
    metadata_names: tuple[str, ...] = ()
    """Those of `tensor_names` that describe the others and hold no weights. Bits per weight leave them out."""
    reserved_names: tuple[str, ...]
    """Local names that only quantized linears have: `tensor_names`, and those of variants that `parse` refuses."""

    @abstractmethod
    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the scales of a model of `model_dtype` are stored. Rounding starts from such scales."""

    @abstractmethod
    def refusal(self, scheme: Scheme) -> str | None:
        """Why the format cannot store weights of `scheme`, as a clause that follows its name; None if it can."""

    @abstractmethod
    def specs(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorSpec]:
        """Dtypes and shapes of what `encode` returns for a weight of `shape` [N, K]. Raises `LlmqError` if refused."""

    @abstractmethod
    def encode(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of a weight, by local name, on its device. Raises `LlmqError` if its scheme is refused."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The weight that stored tensors (by local name) hold: the exact inverse of `encode`.

        Raises `LlmqError`, naming the tensor, where names, dtypes or shapes disagree with `scheme`.
        """

    @abstractmethod
    def check_values(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], prefix: str = "") -> None:
        """Raise `LlmqError` where the values of a linear's scales and metadata cannot be right.

        tensors: at least `scale_name` and `metadata_names`. shape: [N, K], from the model. prefix: of names in messages.
        """

    @abstractmethod
    def config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str], ordered: bool) -> dict[str, Any]:
        """The `quantization_config` of a model whose linears `schemes` (module name -> scheme) are quantized.

        ignore: the names of all other linears. ordered: whether GPTQ rounded columns in activation order.
        Raises `LlmqError` for a scheme, or a mixture of schemes, that the format cannot describe.
        """

    @abstractmethod
    def unsupported_reason(self, quantization_config: Mapping[str, Any]) -> str | None:
        """Why llmq cannot run a checkpoint with this `quantization_config`, as a clause; None if it can."""

    @abstractmethod
    def parse(self, quantization_config: Mapping[str, Any]) -> Layout:
        """The layout that a `quantization_config` describes.

        Raises `LlmqError` for one that `unsupported_reason` has a reason against, and for a malformed one.
        """

    def require(self, scheme: Scheme) -> None:
        """Raise `LlmqError` if the format refuses `scheme`."""
        reason = self.refusal(scheme)
        if reason:
            raise LlmqError(f"{self.name} {reason}")
