"""What a kernel is asked to do and what it is given, as values, and what a kernel is.

A kernel is a module with the members of `Kernel`. It sees the tensors of one weight in the checkpoint's layout and may
make its own layout of them once (`prepare`); it knows nothing of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A packed matmul y [M, N] = x [M, K] @ W^T, without data. M is not part of it: see `Kernel.most_rows`.

    rows, columns: N and K. group_size: columns per scale (K per channel). scale_dtype: of the stored scales.
    dtype: of x and y. device: its type (`cpu`, `cuda`, ...).
    streamed: whether the weight is brought in for each call (offloading), so that nothing made of it may be kept.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype
    dtype: torch.dtype
    device: str
    streamed: bool = False


@dataclass(frozen=True)
class Packed:
    """The tensors of one weight W ~ (code - zero) * scale as they are stored, on one device.

    weight: int32 [N, ceil(K * bits / 32)], codes along K, low bits first. scale: [N, K / group_size].
    zero: int32 [ceil(N * bits / 32), K / group_size], codes along N; None when symmetric, where it is 2**(bits - 1).
    parts: the weights as they are stored whose rows these are, where they were put together for this (`llmq.serving.fused`).
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    parts: tuple[Packed, ...] = ()

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight."""
        return 1 << (self.bits - 1)


class Kernel(Protocol):
    """One way to run a packed matmul. Members of a module, in the place of a class."""

    NAME: str
    JOINS: bool
    """Whether it makes a layout of its own, so that linears of one input gain by being run as one weight."""

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel does not take a problem (what follows its name in a sentence); None where it does."""

    def most_rows(self, problem: Problem) -> int | None:
        """The largest M for which this kernel is the right one, by measurement; None for any."""

    def launch_of(self, problem: Problem, rows: int, device: torch.device) -> str | None:
        """The configuration that M = `rows` is launched with on a device, in words; None where there is none to choose."""

    def prepare(self, packed: Packed) -> Any:
        """The runtime layout: what `run` needs. Made once for a weight; exact."""

    def run(self, x: Tensor, runtime: Any, bias: Tensor | None = None) -> Tensor:
        """x [M, K], M >= 0; bias [N] in x's dtype -> y [M, N] in x's dtype. Differentiable in x and bias."""
