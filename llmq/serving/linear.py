"""`QuantLinear`: a linear whose weight stays packed, in memory as on disk.

Its state is the on-disk tensors under their on-disk names (`llmq.formats.IN_MEMORY`), so `save_pretrained` writes them
unchanged. Casting the module casts the bias but never the scales.

A kernel's runtime layout of the stored tensors is a cache. `ready`, or the first forward that needs it, makes it. It is
never part of a state dict, a copy or a pickle, and moving, casting or loading the module drops it. The cache keeps a
reference to the tensors that it was made from and is rebuilt when the module holds others or one was written to
(`llmq.serving.weight.watch`). Offloaded weights get no cache, which would keep in memory what was put away. A compiled
forward uses layouts that exist and makes none, since a traced one would be made again in every call; after writing to
stored tensors, call `ready`.

It is an `nn.Linear`, so that adapters attach to it; its `weight` is a `PackedWeight`, which holds no data. A dense tensor
assigned to `weight` or `weight.data`, as when an adapter is merged, makes it a plain dense `nn.Linear`.
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
from llmq.serving.autocast import cast_by_autocast
from llmq.serving.weight import PackedWeight, make_dense, versions, watch


class Fusion(Protocol):
    """Linears that read the same input and run as one matmul: see `llmq.serving.fused`."""

    def output(self, position: int, x: Tensor) -> Tensor | None:
        """y of the linear at `position` for x; None if that linear must run alone."""

    def drop_caches(self) -> None:
        """Drop everything that was computed from the members' tensors."""

    def dissolve(self) -> None:
        """Let every member run alone from now on."""


class QuantLinear(nn.Linear):
    """y = x @ dequantize(weight)^T + bias, with the weight packed.

    x: [..., in_features], floating. y: [..., out_features], in x's dtype or autocast's.

    scheme: the weight's grid and the dtype of its scales.
    bias: the dtype of the bias; None for no bias.
    kernel: the name of the only kernel to use (`llmq.kernels.registry`). The first forward that it cannot run raises
        `LlmqError` with all reasons.

    dense_dtype: the dtype of `weight`; casts of the module change it.
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
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: torch.dtype | None = None,
        kernel: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # an nn.Linear's own would make a dense weight
        if scheme.activation is not None:
            raise LlmqError(
                f"QuantLinear runs weight-only schemes; this one quantizes activations: {scheme.activation}"
            )
        self.in_features, self.out_features, self.scheme, self.kernel = in_features, out_features, scheme, kernel
        self.dense_dtype = scheme.scale_dtype
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
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return nn.functional.linear(x, self.dequantize(x.dtype), self._bias(x.dtype))  # kernels have no such rules
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

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [N, K] as code for dense linears reads it: see `PackedWeight`."""
        return PackedWeight(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.make_dense(value)
        else:
            super().__setattr__(name, value)

    def make_dense(self, weight: Tensor) -> None:
        """Become a plain `nn.Linear` with this weight [N, K], in place. The packed tensors are dropped.

        Raises `LlmqError` for another shape and for offloaded weights.
        """
        if self.fusion is not None:
            self.fusion.dissolve()
        make_dense(self, weight, self.offloaded)

    def _kernel_for(self, x: Tensor) -> Kernel:
        return self._kernel(x.dtype, x.numel() // self.in_features, x.device)

    def _kernel(self, dtype: torch.dtype, rows: int, device: torch.device) -> Kernel:
        """The kernel for `rows` rows of x in `dtype` on `device`."""
        key = (dtype, device, self.offloaded, self._parameters["weight_scale"].dtype)  # type: ignore[union-attr]
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
            if torch.compiler.is_exporting():
                continue  # a limit would become a guard on a dynamic number of rows
            missing = torch.compiler.is_compiling() and self._cached_layout(candidate.kernel) is None
            if rows <= candidate.max_rows and not missing:
                return candidate.kernel
        raise AssertionError("the last kernel has no limit")

    def _cached_layout(self, kernel: Kernel) -> RuntimeLayout | None:
        """A kernel's layout, if one was made from the tensors that the module holds now; else None."""
        cached = self._layouts.get(kernel.name)
        if cached is None:
            return None
        (tensors, written), stored = cached[0], self._stored()
        same = all(map(is_, tensors, stored))
        return cached[1] if same and (torch.compiler.is_compiling() or versions(stored) == written) else None

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
            stored = self._stored()
            traced = torch.compiler.is_compiling()
            if not traced:
                watch(stored)
            self._layouts[kernel.name] = ((stored, () if traced else versions(stored)), layout)
        return layout

    def _drop_caches(self) -> None:
        if self.fusion is not None:
            self.fusion.drop_caches()
        self._ranges: dict[tuple[object, ...], tuple[KernelRange, ...]] = {}
        self._layouts: dict[str, tuple[tuple[tuple[Tensor | None, ...], tuple[int, ...]], RuntimeLayout]] = {}

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
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=scale.device)).dtype
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


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
