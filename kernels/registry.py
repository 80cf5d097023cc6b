"""The registry of kernels, and the choice among them.

The order of `KERNELS` is the order of preference. A kernel is chosen if it takes the problem and M is within its
`max_rows`. To add a kernel, write one file that ends with `KERNEL = Kernel(...)` and add one entry here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmq.errors import LlmqError
from llmq.kernels import cpu_int4, reference, slab, wna16
from llmq.kernels.kernel import Kernel
from llmq.kernels.problem import Problem

KERNELS: tuple[Kernel, ...] = (cpu_int4.KERNEL, wna16.KERNEL, slab.KERNEL, reference.KERNEL)


@dataclass(frozen=True)
class KernelRange:
    """A kernel and the M that it runs."""

    max_rows: int | None
    """The largest M; None for any."""
    kernel: Kernel


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for a problem and an M."""

    kernel: Kernel
    refused: tuple[tuple[str, str], ...]
    """(name, reason) of every other kernel, in order of preference."""


def kernel_ranges(
    problem: Problem, forced: str | None = None, kernels: Sequence[Kernel] = KERNELS
) -> tuple[KernelRange, ...]:
    """The kernels that run a problem, by growing M; the last one has no limit.

    forced: the name of the only kernel to use. Raises `LlmqError` with every kernel's reason if it refuses the problem.
    kernels: the candidates in order of preference; the last one must take every problem.
    """
    if forced is not None:
        return (KernelRange(None, _forced(problem, forced, kernels)),)
    ranges: list[KernelRange] = []
    for kernel in kernels:
        if kernel.refusal(problem) is None:
            ranges.append(KernelRange(kernel.max_rows(problem), kernel))
            if ranges[-1].max_rows is None:
                break
    return tuple(ranges)


def choose(problem: Problem, rows: int, forced: str | None = None, kernels: Sequence[Kernel] = KERNELS) -> Choice:
    """The kernel for M = `rows`, and the reason against each of the others. forced, kernels: as in `kernel_ranges`."""
    ranges = kernel_ranges(problem, forced, kernels)
    chosen = next(entry.kernel for entry in ranges if entry.max_rows is None or rows <= entry.max_rows)
    refused: list[tuple[str, str]] = []
    passed = False
    for kernel in kernels:
        passed = passed or kernel is chosen
        if kernel is chosen:
            continue
        reason = kernel.refusal(problem)
        if reason is None and forced is not None:
            reason = f"is not used because {forced} is forced"
        if reason is None and not passed:
            reason = f"runs at most {kernel.max_rows(problem)} rows"
        refused.append((kernel.name, reason or f"comes after {chosen.name}"))
    return Choice(chosen, tuple(refused))


def _forced(problem: Problem, name: str, kernels: Sequence[Kernel]) -> Kernel:
    by_name = {kernel.name: kernel for kernel in kernels}
    if name not in by_name:
        raise LlmqError(f"kernel must be one of {', '.join(by_name)}; got {name!r}")
    if by_name[name].refusal(problem) is None:
        return by_name[name]
    reasons = "; ".join(f"{kernel.name} {kernel.refusal(problem) or 'can run it'}" for kernel in kernels)
    raise LlmqError(f"the kernel {name} cannot run this layer: {reasons}")
