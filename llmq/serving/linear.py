"""`QuantLinear`: a linear whose weight stays packed, in memory as on disk.

State is the on-disk tensors under their on-disk names (`llmq.formats.compressed_tensors`), so `save_pretrained` writes
them as they are. Scales keep their stored dtype whatever the module is cast to; a bias follows.

What a kernel makes of the stored tensors (its runtime layout) is a cache: never in a state dict, a copy or a pickle,
dropped when the module moves, casts or loads, made by `ready` or the first forward that needs it. It holds on to the
tensors that it was made of, and is made anew when they are others; one that is written to in place, from outside, is not
noticed. Weights that are offloaded (`streamed`) get no such cache: it would hold in memory what was put away. A compiled
forward uses the layouts that are there and makes none, since a traced one would be made in every call.

Not an `nn.Linear`: transformers initializes the `weight` of those by name.
Left out: gradients of the weight; those of the input flow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.formats import compressed_tensors as ct
from llmq.kernels.kernel import Kernel, RuntimeLayout
from llmq.kernels.problem import Packed, Problem
from llmq.kernels.registry import KERNELS, Choice, KernelRange, choose, kernel_ranges


class Together(Protocol):
    """Linears that read one input and are run as one: see `llmq.serving.fused`."""

    def output(self, place: int, x: Tensor) -> Tensor | None:
        """y for x of the linear at `place` among them; None where it must compute by itself."""

    def forget(self) -> None:
        """Drop what was made of the members' tensors."""


class QuantLinear(nn.Module):
    """y = x @ dequantized(weight)^T + bias. x: [..., in_features], floating; y: [..., out_features] in x's dtype, or
    autocast's.

    grid: bits, group size, symmetry. dtype: of the scales. bias: its dtype, None for no bias. kernel: force one of
    `llmq.kernels.registry` by name; `LlmqError` with all reasons at the first forward that it cannot run.
    streamed: whether the tensors are brought in for each forward and taken away after.
    together, place: the linears that this one is run with, and which of them it is: set by `llmq.serving.fused.join`.
    """

    kernels: tuple[Kernel, ...] = KERNELS
    """The candidates in order of preference; `kernels_overridden` replaces them for a while."""
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
        bias: torch.dtype | None = None,
        kernel: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid, self.kernel = in_features, out_features, grid, kernel
        self.streamed = False
        self.together: Together | None = None
        self.place = 0
        for name, spec in ct.specs((out_features, in_features), grid, dtype).items():
            self.register_parameter(name, _parameter(torch.empty(spec.shape, dtype=spec.dtype, device=device)))
        kept = None if bias is None else _parameter(torch.empty(out_features, dtype=bias, device=device))
        self.register_parameter("bias", kept)
        self._forget()

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, kernel: str | None = None
    ) -> QuantLinear:
        """The linear of a quantized weight, on its device. `LlmqError` for scales per tensor, which are not stored."""
        rows, columns = weight.shape
        size = None if weight.group_size == columns else weight.group_size
        grid = Grid(weight.bits, size, weight.symmetric)
        made = cls(columns, rows, grid, weight.scale.dtype, None if bias is None else bias.dtype, kernel, "meta")
        for name, tensor in ct.encode(weight).items():
            setattr(made, name, _parameter(tensor))
        if bias is not None:
            made.bias = _parameter(bias.detach())
        return made

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise LlmqError(f"the input must end in {self.in_features} features; got {list(x.shape)}")
        if self.together is not None:
            y = self.together.output(self.place, x)
            if y is not None:
                return y
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        x = under_autocast(x)
        return self._through(self._kernel_for(x), x)

    def _through(self, kernel: Kernel, x: Tensor) -> Tensor:
        flat = x if x.ndim == 2 else x.reshape(-1, self.in_features)  # [M, K]
        y = kernel.run(flat, self._layout(kernel), self._bias(x.dtype))
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features)

    def ready(self, dtype: torch.dtype, rows: int = 1) -> None:
        """Make now the layout that a forward of this linear alone with `rows` rows of x in `dtype` needs, so that a compiled
        one finds it.
        """
        self._layout(self._kernel(dtype, rows, self.device))

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        device: torch.device = self._stored()[0].device  # type: ignore[union-attr]
        return device

    def problem(self, dtype: torch.dtype) -> Problem:
        """What a kernel is asked to do for x of `dtype`."""
        return Problem(
            out_features=self.out_features,
            in_features=self.in_features,
            bits=self.grid.bits,
            group_size=self.grid.columns_per_group(self.in_features),
            symmetric=self.grid.symmetric,
            scale_dtype=self.weight_scale.dtype,
            dtype=dtype,
            device=self.device.type,
            offloaded=self.streamed,
        )

    def choice(self, dtype: torch.dtype, rows: int) -> Choice:
        """The kernel that `rows` rows of x in `dtype` are run with, and why not the others."""
        return choose(self.problem(dtype), rows, self.kernel, self.kernels)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as codes, scales and zero points. `LlmqError` where the stored tensors contradict each other."""
        tensors = {name: getattr(self, name).data for name in ct.SUFFIXES if hasattr(self, name)}
        return ct.decode(tensors, self.grid)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], in the scales' dtype where none is given."""
        return self.quantized_weight().dequantize(dtype)

    def _kernel_for(self, x: Tensor) -> Kernel:
        return self._kernel(x.dtype, x.numel() // self.in_features, x.device)

    def _kernel(self, dtype: torch.dtype, rows: int, device: torch.device) -> Kernel:
        """For x of `dtype` on `device`."""
        key = (dtype, device, self.streamed)
        ladder = self._ladders.get(key)
        if ladder is None:
            if not dtype.is_floating_point:
                raise LlmqError(f"the input must be floating; got {dtype}")
            if device != self.device:
                raise LlmqError(f"the input must be where the weight is, on {self.device}; it is on {device}")
            ladder = self._ladders[key] = kernel_ranges(self.problem(dtype), self.kernel, self.kernels)
        for step in ladder:
            if step.max_rows is None:
                return step.kernel
            if rows <= step.max_rows and not (torch.compiler.is_compiling() and self._made(step.kernel) is None):
                return step.kernel
        raise AssertionError("the last step has no limit")

    def _made(self, kernel: Kernel) -> RuntimeLayout | None:
        """A kernel's layout, if there is one of the tensors as they are now."""
        made = self._layouts.get(kernel.name)
        if made is None:
            return None
        return made[1] if all(map(is_, made[0], self._stored())) else None

    def _stored(self) -> tuple[Tensor | None, ...]:
        """The tensors that a layout is made of. Not by attribute: every forward asks, and torch looks long for those."""
        own = self._parameters
        return own["weight_packed"], own["weight_scale"], own.get("weight_zero_point")

    def packed(self) -> Packed:
        """The weight as kernels see it."""
        size, (weight, scale, zero) = self.grid.columns_per_group(self.in_features), self._stored()
        assert weight is not None and scale is not None  # noqa: PT018 - of an empty slot, torch's own error comes first
        return Packed(self.out_features, self.in_features, self.grid.bits, size, weight, scale, zero)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        bias = self._parameters["bias"]
        return bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def _layout(self, kernel: Kernel) -> RuntimeLayout:
        layout = self._made(kernel)
        if layout is not None:
            return layout
        with torch.inference_mode(False), torch.no_grad():  # what inference mode makes could not be used outside of it
            layout = kernel.prepare(self.packed())
        if not self.streamed:
            self._layouts[kernel.name] = (self._stored(), layout)
        return layout

    def _forget(self) -> None:
        if self.together is not None:
            self.together.forget()
        self._ladders: dict[tuple[object, ...], tuple[KernelRange, ...]] = {}
        self._layouts: dict[str, tuple[tuple[Tensor | None, ...], RuntimeLayout]] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Moves reach everything; casts do not reach the scales, whose dtype is part of the format."""
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
            self._forget()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ladders": {}, "_layouts": {}}

    def extra_repr(self) -> str:
        size = "per channel" if self.grid.group_size is None else f"groups of {self.grid.group_size}"
        kind = "symmetric" if self.grid.symmetric else "asymmetric"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, int{self.grid.bits} {kind}, {size}"
        )


def under_autocast(x: Tensor) -> Tensor:
    """x as a linear of torch takes it: in autocast's dtype inside of it, but for float64."""
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


@contextmanager
def kernels_overridden(linears: Sequence[QuantLinear], kernels: Sequence[Kernel]) -> Iterator[None]:
    """While open, `linears` choose among `kernels` instead of the registry's. A layout is reused by its kernel's name."""
    before = [vars(linear).pop("kernels", None) for linear in linears]
    try:
        for linear in linears:
            linear.kernels, linear._ladders = tuple(kernels), {}
        yield
    finally:
        for linear, own in zip(linears, before, strict=True):
            vars(linear).pop("kernels", None)
            linear._ladders = {}
            if own is not None:
                linear.kernels = own


@contextmanager
def forward_overridden(
    modules: Sequence[nn.Module], forward_of: Callable[[Any], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """While open, each of `modules` runs `forward_of(module)` instead of its own forward."""
    own = [vars(module).pop("forward", None) for module in modules]  # accelerate's hooks stand there
    try:
        for module in modules:
            vars(module)["forward"] = forward_of(module)
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            vars(module).pop("forward", None)
            if before is not None:
                vars(module)["forward"] = before
