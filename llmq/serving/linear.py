"""`QuantLinear`: a linear whose weight stays packed, in memory as on disk.

Its state is the on-disk tensors under their on-disk names (`llmq.formats.IN_MEMORY`), so `save_pretrained` writes them
unchanged. Casting the module casts the bias but never the scales.

A kernel's runtime layout of the stored tensors is a cache. `ready`, or the first forward that needs it, makes it. It is
never part of a state dict, a copy or a pickle, and moving, casting or loading the module drops it. The cache keeps a
reference to the tensors that it was made from and is rebuilt when the module holds others; an in-place write to one of
them from outside is not noticed. Offloaded weights get no cache, which would keep in memory what was put away. A compiled
forward uses layouts that exist and makes none, since a traced one would be made again in every call.

It is not an `nn.Linear`, because transformers initializes the `weight` of those by name.
Left out: gradients of the weight. Gradients of the input flow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq.core.quantized import QuantizedWeight
from llmq.core.scheme import Scheme, scheme_of
from llmq.errors import LlmqError
from llmq.formats import IN_MEMORY
from llmq.kernels.kernel import Kernel, RuntimeLayout
from llmq.kernels.problem import Packed, Problem
from llmq.kernels.registry import KERNELS, Choice, KernelRange, choose, kernel_ranges


class Fusion(Protocol):
    """Linears that read the same input and run as one matmul: see `llmq.serving.fused`."""

    def output(self, position: int, x: Tensor) -> Tensor | None:
        """y of the linear at `position` for x; None if that linear must run alone."""

    def drop_caches(self) -> None:
        """Drop everything that was computed from the members' tensors."""


class QuantLinear(nn.Module):
    """y = x @ dequantize(weight)^T + bias, with the weight packed.

    x: [..., in_features], floating. y: [..., out_features], in x's dtype or autocast's.

    scheme: the weight's grid and the dtype of its scales.
    bias: the dtype of the bias; None for no bias.
    kernel: the name of the only kernel to use (`llmq.kernels.registry`). The first forward that it cannot run raises
        `LlmqError` with all reasons.

    offloaded: whether the tensors are brought in for each forward and taken away afterwards.
    fusion, position: the linears that this one is fused with, and its index among them; set by
        `llmq.serving.fused.fuse_linears`.

    Raises `LlmqError` for a scheme that quantizes activations or that the in-memory format refuses.
    """

    kernels: tuple[Kernel, ...] = KERNELS
    """The candidates in order of preference; `kernels_overridden` replaces them."""
    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_shape: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: torch.dtype | None = None,
        kernel: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if scheme.activation is not None:
            raise LlmqError(
                f"QuantLinear runs weight-only schemes; this one quantizes activations: {scheme.activation}"
            )
        self.in_features, self.out_features, self.scheme, self.kernel = in_features, out_features, scheme, kernel
        self.offloaded = False
        self.fusion: Fusion | None = None
        self.position = 0
        for name, spec in IN_MEMORY.specs((out_features, in_features), scheme).items():
            self.register_parameter(name, _parameter(torch.empty(spec.shape, dtype=spec.dtype, device=device)))
        own_bias = None if bias is None else _parameter(torch.empty(out_features, dtype=bias, device=device))
        self.register_parameter("bias", own_bias)
        self._drop_caches()

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, kernel: str | None = None
    ) -> QuantLinear:
        """The linear of a quantized weight, on its device. Raises `LlmqError` for a scheme that cannot be stored."""
        rows, columns = weight.shape
        linear = cls(columns, rows, scheme_of(weight), None if bias is None else bias.dtype, kernel, "meta")
        for name, tensor in IN_MEMORY.encode(weight).items():
            setattr(linear, name, _parameter(tensor))
        if bias is not None:
            linear.bias = _parameter(bias.detach())
        return linear

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise LlmqError(f"the last dimension of the input must be {self.in_features}; got {list(x.shape)}")
        if self.fusion is not None:
            y = self.fusion.output(self.position, x)
            if y is not None:
                return y
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        """y for x, without fusion."""
        x = cast_by_autocast(x)
        return self._run_kernel(self._kernel_for(x), x)

    def _run_kernel(self, kernel: Kernel, x: Tensor) -> Tensor:
        flat = x if x.ndim == 2 else x.reshape(-1, self.in_features)  # [M, K]
        y = kernel.run(flat, self._layout(kernel), self._bias(x.dtype))
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features)

    def ready(self, dtype: torch.dtype, rows: int = 1) -> None:
        """Make the layout for forwards of this linear alone with `rows` rows of x in `dtype`.

        Call it before compiling: a compiled forward uses only layouts that exist.
        """
        self._layout(self._kernel(dtype, rows, self.device))

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        device: torch.device = self._stored()[0].device  # type: ignore[union-attr]
        return device

    def problem(self, dtype: torch.dtype) -> Problem:
        """The matmul that a kernel must run for x of `dtype`."""
        return Problem(
            out_features=self.out_features,
            in_features=self.in_features,
            bits=self.scheme.weight.bits,
            group_size=self.scheme.weight.columns_per_group(self.in_features),
            symmetric=self.scheme.weight.symmetric,
            scale_dtype=self.weight_scale.dtype,
            dtype=dtype,
            device=self.device.type,
            offloaded=self.offloaded,
        )

    def choice(self, dtype: torch.dtype, rows: int) -> Choice:
        """The kernel that runs `rows` rows of x in `dtype`, and why the others do not."""
        return choose(self.problem(dtype), rows, self.kernel, self.kernels)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as codes, scales and zeros. Raises `LlmqError` where stored tensors contradict each other."""
        tensors = {name: getattr(self, name).data for name in IN_MEMORY.tensor_names if hasattr(self, name)}
        return IN_MEMORY.decode(tensors, self.scheme)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], by default in the scales' dtype."""
        return self.quantized_weight().dequantize(dtype)

    def _kernel_for(self, x: Tensor) -> Kernel:
        return self._kernel(x.dtype, x.numel() // self.in_features, x.device)

    def _kernel(self, dtype: torch.dtype, rows: int, device: torch.device) -> Kernel:
        """The kernel for `rows` rows of x in `dtype` on `device`."""
        key = (dtype, device, self.offloaded)
        ranges = self._ranges.get(key)
        if ranges is None:
            if not dtype.is_floating_point:
                raise LlmqError(f"the input must be floating; got {dtype}")
            if device != self.device:
                raise LlmqError(
                    f"input and weight must be on one device; the weight is on {self.device}, x on {device}"
                )
            ranges = self._ranges[key] = kernel_ranges(self.problem(dtype), self.kernel, self.kernels)
        for candidate in ranges:
            if candidate.max_rows is None:
                return candidate.kernel
            missing = torch.compiler.is_compiling() and self._cached_layout(candidate.kernel) is None
            if rows <= candidate.max_rows and not missing:
                return candidate.kernel
        raise AssertionError("the last kernel has no limit")

    def _cached_layout(self, kernel: Kernel) -> RuntimeLayout | None:
        """A kernel's layout, if one was made from the tensors that the module holds now; else None."""
        cached = self._layouts.get(kernel.name)
        if cached is None:
            return None
        return cached[1] if all(map(is_, cached[0], self._stored())) else None

    def _stored(self) -> tuple[Tensor | None, ...]:
        """The tensors that a layout is made from. Read from `_parameters`: attribute lookup is slow in every forward."""
        own = self._parameters
        return own["weight_packed"], own["weight_scale"], own.get("weight_zero_point")

    def packed(self) -> Packed:
        """The weight in the form that kernels take."""
        grid, (weight, scale, zero) = self.scheme.weight, self._stored()
        size = grid.columns_per_group(self.in_features)
        assert weight is not None and scale is not None  # noqa: PT018 - if missing, torch raises its own error first
        return Packed(self.out_features, self.in_features, grid.bits, size, weight, scale, zero)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        bias = self._parameters["bias"]
        return bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def _layout(self, kernel: Kernel) -> RuntimeLayout:
        """The kernel's layout: the cached one, or a new one."""
        layout = self._cached_layout(kernel)
        if layout is not None:
            return layout
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode cannot be used outside it
            layout = kernel.prepare(self.packed())
        if not self.offloaded:
            self._layouts[kernel.name] = (self._stored(), layout)
        return layout

    def _drop_caches(self) -> None:
        if self.fusion is not None:
            self.fusion.drop_caches()
        self._ranges: dict[tuple[object, ...], tuple[KernelRange, ...]] = {}
        self._layouts: dict[str, tuple[tuple[Tensor | None, ...], RuntimeLayout]] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move every tensor, and cast all but the scales, whose dtype is part of the scheme."""
        scale = self.weight_scale
        changed = False

        def apply(tensor: Tensor) -> Tensor:
            nonlocal changed
            moved = fn(tensor)
            if tensor is scale and moved.dtype != scale.dtype:
                moved = tensor.to(moved.device)
            changed = changed or moved is not tensor
            return moved

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        if changed:
            self._drop_caches()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._drop_caches()
        super()._load_from_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ranges": {}, "_layouts": {}}

    def extra_repr(self) -> str:
        grid = self.scheme.weight
        size = "per channel" if grid.group_size is None else f"groups of {grid.group_size}"
        kind = "symmetric" if grid.symmetric else "asymmetric"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, int{grid.bits} {kind}, {size}"


def cast_by_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is enabled, as torch's own linear casts it; float64 is never cast."""
    if (
        x.is_meta
        or not torch.is_autocast_enabled(x.device.type)
        or not x.is_floating_point()
        or x.dtype == torch.float64
    ):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
