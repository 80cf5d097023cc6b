"""What code reads as `linear.weight` of a packed linear; and stored tensors whose writes are counted.

`PackedWeight` has the shape, dtype and device of the dense weight and holds no data: an operation on it runs on the
weight dequantized for this operation. Code that asks for metadata (PEFT), skips initialized weights (transformers'
`_init_weights`) or computes with a weight works unchanged. Assigning its `data`, as merging an adapter does, makes its
linear a dense `nn.Linear`. Writing to it in place is refused.

`watch` makes `tensor.data` share the tensor's version counter, which torch's own does not, so that layouts made from a
stored tensor notice every write to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llmq.errors import LlmqError

DENSE_ATTRIBUTES = ("data", "T", "mT", "H", "mH", "real", "imag")
METADATA = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous"),
    *("is_floating_point", "is_complex", "get_device", "__len__", "is_inference", "type"),
)


class Linear(Protocol):
    """The linear that a `PackedWeight` belongs to."""

    in_features: int
    out_features: int
    dense_dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor: ...

    def make_dense(self, weight: Tensor) -> None: ...


class PackedWeight(Tensor):
    """The weight [N, K] of a packed linear, in its dense dtype, dequantized for each operation. Holds no data."""

    linear: Linear
    _is_hf_initialized: bool

    @staticmethod
    def __new__(cls, linear: Linear) -> PackedWeight:
        shape = (linear.out_features, linear.in_features)
        weight: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=linear.dense_dtype, device=linear.device)
        weight.linear = linear
        weight._is_hf_initialized = True  # transformers' functions of initialization leave it alone
        return weight

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__set__" and attribute == "data":
            args[0].linear.make_dense(args[1])
            return None
        if name in METADATA or name == "__set__" or (name == "__get__" and attribute not in DENSE_ATTRIBUTES):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        written = args[0] if args else None
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name[:3] == "__i"
        if in_place and isinstance(written, PackedWeight) and name not in ("__invert__", "__index__", "__int__"):
            raise LlmqError(
                f"the weight of a packed linear cannot be written in place (by {name}): "
                "assign a dense tensor to linear.weight, or dequantize the model first with model.dequantize()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))


def _dense(value: Any) -> Any:
    return value.linear.dequantize(value.linear.dense_dtype) if isinstance(value, PackedWeight) else value


class WatchedParameter(nn.Parameter):
    """A parameter whose `data` counts writes: reading gives a tensor with the same version counter."""

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        kept = value.data_ptr() == self.data_ptr() and value.dtype == self.dtype
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        if not kept and not self.is_inference():
            torch.autograd.graph.increment_version(self)


def watch(tensors: Sequence[Tensor | None]) -> None:
    """Turn plain parameters among `tensors` into `WatchedParameter`s, in place."""
    for tensor in tensors:
        if type(tensor) is nn.Parameter:
            tensor.__class__ = WatchedParameter


def versions(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """How many writes each tensor has seen; 0 where there is none or torch does not count them."""
    return tuple([0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors])


def make_dense(linear: nn.Linear, weight: Tensor, offloaded: bool) -> None:
    """Turn a packed linear into a plain `nn.Linear` with this weight [N, K], in place; hooks and bias are kept.

    Raises `LlmqError` for another shape and for offloaded weights.
    """
    shape = (linear.out_features, linear.in_features)
    if tuple(weight.shape) != shape:
        raise LlmqError(f"the weight of this linear must be {list(shape)}; got {list(weight.shape)}")
    if offloaded:
        raise LlmqError("this linear is offloaded and cannot become dense: load the model without offloading")
    bias, training = linear.bias, linear.training
    hooks = {name: value for name, value in vars(linear).items() if "hooks" in name}
    plain = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    vars(linear).clear()
    linear.__class__ = nn.Linear
    vars(linear).update({**vars(plain), **hooks, "training": training})
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
