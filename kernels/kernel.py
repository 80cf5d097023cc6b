"""`Kernel`: one way to run a packed matmul, as a value.

Each kernel file ends with one `KERNEL = Kernel(...)`. `llmq.kernels.registry.KERNELS` lists them. The defaults describe a
kernel that takes every problem and every M, reads the stored layout and has no launch configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from llmq.kernels.problem import Packed, Problem


class RuntimeLayout(Protocol):
    """What `Kernel.prepare` returns: a dataclass. Its tensor fields are the memory that the layout takes."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def out_features(self) -> int:
        """N."""


class Run(Protocol):
    """The type of `Kernel.run`."""

    def __call__(self, x: Tensor, runtime: Any, /, bias: Tensor | None = None) -> Tensor: ...


def accept(problem: Problem) -> str | None:
    """The `refusal` of a kernel that takes every problem."""
    return None


def unlimited(problem: Problem) -> int | None:
    """The `max_rows` of a kernel without a limit."""
    return None


def no_launch(problem: Problem, rows: int, device: torch.device) -> str | None:
    """The `describe_launch` of a kernel without a launch configuration."""
    return None


def stored(packed: Packed) -> Packed:
    """The `prepare` of a kernel that reads the stored layout."""
    return packed


@dataclass(frozen=True)
class Kernel:
    """A packed matmul kernel. It sees the tensors of one weight; it knows nothing of models or files."""

    name: str
    """The name that `kernel=` options and reports use."""
    run: Run
    """(x [M, K] with M >= 0, runtime layout, bias [N] in x's dtype or None) -> y [M, N] in x's dtype. Differentiable in x
    and bias."""
    prepare: Callable[[Packed], RuntimeLayout] = stored
    """Make the runtime layout of a weight. Called once per weight; must lose nothing."""
    refusal: Callable[[Problem], str | None] = accept
    """The reason why the kernel cannot run a problem, worded to follow its name in a sentence; None if it can."""
    max_rows: Callable[[Problem], int | None] = unlimited
    """The largest M for which the kernel is preferred, by measurement; None for any M."""
    describe_launch: Callable[[Problem, int, torch.device], str | None] = no_launch
    """The launch configuration for M rows on a device, as text; None if the kernel has none."""
    supports_fusion: bool = False
    """True if linears that read one input run faster as one concatenated weight: the kernel has a layout of its own."""
