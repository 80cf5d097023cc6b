"""`QuantLinear`: a linear whose weight stays packed, in memory as on disk.

State is the on-disk tensors under their on-disk names (`llmq.formats.compressed_tensors`), so `save_pretrained` writes
them as they are. What a kernel makes of them (its runtime layout) is a cache: never saved, dropped when the module moves
or loads, rebuilt by the next forward. Scales keep their stored dtype whatever the module is cast to.
Not an `nn.Linear`: transformers initializes the `weight` of those by name.
Left out: gradients of the weight; those of the input flow (the slab kernel is differentiable).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors as ct
from llmq.kernels import slab
from llmq.kernels.problem import Packed, Problem
from llmq.kernels.registry import Choice, choose


class QuantLinear(nn.Module):
    """y = x @ dequantized(weight)^T + bias. x: [..., in_features] in any floating dtype; y in the same.

    grid: bits, group size, symmetry. dtype: of the scales. kernel: force one of `llmq.kernels.registry` by name.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_shape: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        dtype: torch.dtype,
        bias: bool = False,
        kernel: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid, self.kernel = in_features, out_features, grid, kernel
        for name, spec in ct.specs((out_features, in_features), grid, dtype).items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        kept = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self.register_parameter("bias", kept)
        self._runtime: dict[tuple[str, torch.dtype], tuple[int, Any]] = {}  # by kernel and dtype: address, layout

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> QuantLinear:
        """The linear of a quantized weight."""
        rows, columns = weight.shape
        size = None if weight.group_size == columns else weight.group_size
        made = cls(columns, rows, Grid(weight.bits, size, weight.symmetric), weight.scale.dtype, bias is not None)
        for name, tensor in ct.encode(weight).items():
            getattr(made, name).data = tensor
        if bias is not None and made.bias is not None:
            made.bias.data = bias.detach()
        return made

    def problem(self, dtype: torch.dtype) -> Problem:
        """What a kernel is asked to do for x of `dtype`."""
        size = self.grid.columns_per_group(self.in_features)
        device = self.weight_packed.device.type
        return Problem(self.out_features, self.in_features, self.grid.bits, size, self.grid.symmetric, dtype, device)

    def choice(self, dtype: torch.dtype, rows: int) -> Choice:
        """The kernel that `rows` rows of x in `dtype` would be run with, and why not the others."""
        return choose(self.problem(dtype), rows, self.kernel)

    def packed(self, dtype: torch.dtype) -> Packed:
        """The stored tensors as a kernel's input."""
        return Packed(
            self.problem(dtype), self.weight_packed, self.weight_scale, getattr(self, "weight_zero_point", None)
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise LlmqError(f"the input must end in {self.in_features} features; got {list(x.shape)}")
        flat = x.reshape(-1, self.in_features)  # [M, K]
        if x.requires_grad and torch.is_grad_enabled():
            y = slab.run(flat, self.packed(x.dtype))
        else:
            kernel = self.choice(x.dtype, flat.shape[0]).kernel
            y = kernel.run(flat, self._prepared(kernel, x.dtype))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _prepared(self, kernel: Any, dtype: torch.dtype) -> Any:
        """A kernel's runtime layout of the tensors as they are now (offloading replaces them from call to call)."""
        key, place = (kernel.NAME, dtype), self.weight_packed.data_ptr()
        if key not in self._runtime or self._runtime[key][0] != place:
            with torch.inference_mode(False):  # or it could not be used outside of it later
                self._runtime[key] = place, kernel.prepare(self.packed(dtype))
        return self._runtime[key][1]

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as codes, scales and zero points."""
        tensors = {name: getattr(self, name).data for name in ct.SUFFIXES if hasattr(self, name)}
        return ct.decode(tensors, self.grid)

    def dequantize(self) -> Tensor:
        """The dense weight [N, K] in the scales' dtype."""
        return self.quantized_weight().dequantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Moves follow; casts do not reach the scales, whose dtype is part of the format."""
        self._runtime.clear()
        kept = self.weight_scale.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != kept.dtype:
            moved = self.weight_scale.device
            self.weight_scale.data = kept if kept.device == moved else kept.to(moved)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runtime": {}}

    def extra_repr(self) -> str:
        size = self.grid.group_size or "channel"
        kind = "symmetric" if self.grid.symmetric else "asymmetric"
        return (
            f"{self.in_features}, {self.out_features}, int{self.grid.bits} g{size} {kind}, bias={self.bias is not None}"
        )
