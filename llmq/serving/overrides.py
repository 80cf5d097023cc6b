"""Replacing, for a while, what packed linears run: their kernels, or a module's whole forward. For measuring and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llmq.kernels.kernel import Kernel
from llmq.serving.linear import QuantLinear


@contextmanager
def kernels_overridden(linears: Sequence[QuantLinear], kernels: Sequence[Kernel]) -> Iterator[None]:
    """Within the context, `linears` choose among `kernels` instead of the registry's. Layouts are reused by kernel name."""
    before = [vars(linear).pop("kernels", None) for linear in linears]
    try:
        for linear in linears:
            linear.kernels, linear._ranges = tuple(kernels), {}
        yield
    finally:
        for linear, own in zip(linears, before, strict=True):
            vars(linear).pop("kernels", None)
            linear._ranges = {}
            if own is not None:
                linear.kernels = own


@contextmanager
def forward_overridden(
    modules: Sequence[nn.Module], forward_of: Callable[[Any], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Within the context, each of `modules` runs `forward_of(module)` in place of its own forward."""
    own = [vars(module).pop("forward", None) for module in modules]  # where accelerate puts its hooks
    try:
        for module in modules:
            vars(module)["forward"] = forward_of(module)
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            vars(module).pop("forward", None)
            if before is not None:
                vars(module)["forward"] = before
