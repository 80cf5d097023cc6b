"""`Scheme`: how one linear is quantized, without any data: the weight's grid, the activations' grid, the scales' dtype.

A `Grid` alone says which affine map a weight is rounded with. A scheme is what plans, formats and packed linears agree
on. Activation grids are declared here so that formats and linears can name and refuse them; nothing runs them yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmq.core.grid import Grid
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError

STRATEGIES = ("token", "tensor")


@dataclass(frozen=True)
class ActivationGrid:
    """The integer grid of a linear's input. Raises `LlmqError` for an unknown strategy."""

    bits: int
    """Bits of a code."""
    strategy: str
    """What shares one scale: `token` (a row of x) or `tensor` (all of x)."""
    symmetric: bool
    """Whether there is no zero point."""
    dynamic: bool
    """Whether scales are computed from each x. Static scales are stored with the weight."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise LlmqError(f"activation strategy must be one of {', '.join(STRATEGIES)}; got {self.strategy!r}")

    def __str__(self) -> str:
        """As in `dynamic int8 per token`."""
        return f"{'dynamic' if self.dynamic else 'static'} int{self.bits} per {self.strategy}"


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized."""

    weight: Grid
    """The grid of the weight."""
    activation: ActivationGrid | None
    """The grid of the input; None where the input is not quantized."""
    scale_dtype: torch.dtype
    """The dtype in which the weight's scales are stored. Scales are rounded to it before codes are computed."""


def scheme_of(weight: QuantizedWeight) -> Scheme:
    """The weight-only scheme of a quantized weight. A group as wide as the weight is one scale per channel."""
    size = None if weight.group_size == weight.shape[1] else weight.group_size
    return Scheme(Grid(weight.bits, size, weight.symmetric), None, weight.scale.dtype)
