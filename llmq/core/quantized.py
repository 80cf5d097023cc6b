"""`QuantizedWeight`: the value that a rounding method returns, a format stores and a packed linear runs.

    weight ~ (codes - zero) * scale

A group is a run of consecutive columns that share one scale and one zero point. `scale` is [N, G] with
G = K / group_size; one group per row ("per channel") is G = 1. Codes are unsigned, 0 .. 2**bits - 1. A symmetric weight
has no `zero` tensor: its zero is the middle code, 2**(bits - 1). Scales are finite and nonzero, and may be negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import LlmqError


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] on an affine grid. Raises `LlmqError` where shapes or dtypes contradict each other."""

    codes: Tensor
    """uint8 [N, K], each 0 .. 2**bits - 1."""
    scale: Tensor
    """Floating [N, G], in the dtype in which it is stored."""
    zero: Tensor | None
    """uint8 [N, G]; None when symmetric."""
    group_size: int
    """Columns per group; K for one group per row."""
    bits: int
    """2, 3, 4 or 8."""

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = columns // self.group_size
        if groups * self.group_size != columns:
            raise LlmqError(f"group_size must divide in_features {columns}; got {self.group_size}")
        if self.scale.shape != (rows, groups):
            raise LlmqError(f"scale must be [{rows}, {groups}]; got {list(self.scale.shape)}")
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise LlmqError(f"zero must be shaped like scale {list(self.scale.shape)}; got {list(self.zero.shape)}")
        if self.codes.dtype != torch.uint8 or (self.zero is not None and self.zero.dtype != torch.uint8):
            raise LlmqError("codes and zero must be uint8")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zero is None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], computed in float32 and rounded once to `dtype` (default: the scales').

        The product of a code difference and a 16-bit scale is exact in float32, so every engine that multiplies in
        float32 or in the scale's dtype gets the same bits.
        """
        rows, columns = self.shape
        middle = 1 << (self.bits - 1)
        codes = self.codes.view(rows, -1, self.group_size).float()  # [N, G, g]
        zero = middle if self.zero is None else self.zero.float().unsqueeze(-1)
        weight = (codes - zero).mul_(self.scale.float().unsqueeze(-1))
        return weight.view(rows, columns).to(dtype or self.scale.dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Output rows start .. stop - 1: one linear of several that were rounded as one stacked weight."""
        return QuantizedWeight(
            self.codes[start:stop],
            self.scale[start:stop],
            None if self.zero is None else self.zero[start:stop],
            self.group_size,
            self.bits,
        )

    def select(self, rows: Tensor) -> QuantizedWeight:
        """The weight of some output rows. rows: int64 [n], their numbers."""
        zero = None if self.zero is None else self.zero[rows]
        return QuantizedWeight(self.codes[rows], self.scale[rows], zero, self.group_size, self.bits)
