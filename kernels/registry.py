"""Which kernel runs a packed matmul, and why not the others.

A kernel is a module with the members of `llmq.kernels.problem.Kernel`; adding one is a file and an entry in `KERNELS`,
whose order is that of preference. What decides: whether a kernel takes the problem at all, then the number of rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import LlmqError
from llmq.kernels import cpu_int4, reference, slab, wna16
from llmq.kernels.problem import Kernel, Problem

KERNELS: tuple[Kernel, ...] = (cpu_int4, wna16, slab, reference)


@dataclass(frozen=True)
class Step:
    """A kernel and the largest M for which it runs; None for any."""

    most_rows: int | None
    kernel: Kernel


@dataclass(frozen=True)
class Choice:
    """kernel: what runs. refused: (name, reason) of every other kernel."""

    kernel: Kernel
    refused: tuple[tuple[str, str], ...]


def steps(problem: Problem, forced: str | None = None) -> tuple[Step, ...]:
    """The kernels that take turns as M grows, the last one without a limit.

    forced: the name of the only kernel to use; `LlmqError` where it refuses the problem, with every kernel's reason.
    """
    if forced is not None:
        return (Step(None, _forced(problem, forced)),)
    found: list[Step] = []
    for kernel in KERNELS:
        if kernel.refusal(problem) is None:
            found.append(Step(kernel.most_rows(problem), kernel))
            if found[-1].most_rows is None:
                break
    return tuple(found)


def choose(problem: Problem, rows: int, forced: str | None = None) -> Choice:
    """The kernel for M = `rows`, and why it is none of the others. forced: as in `steps`."""
    ladder = steps(problem, forced)
    chosen = next(step.kernel for step in ladder if step.most_rows is None or rows <= step.most_rows)
    refused: list[tuple[str, str]] = []
    passed = False
    for kernel in KERNELS:
        passed = passed or kernel is chosen
        if kernel is chosen:
            continue
        reason = kernel.refusal(problem)
        if reason is None and forced is not None:
            reason = f"was not asked for, {forced} was"
        if reason is None and not passed:
            reason = f"is for up to {kernel.most_rows(problem)} rows"
        refused.append((kernel.NAME, reason or f"comes after {chosen.NAME}"))
    return Choice(chosen, tuple(refused))


def _forced(problem: Problem, name: str) -> Kernel:
    for kernel in KERNELS:
        if name == kernel.NAME:
            break
    else:
        raise LlmqError(f"kernel must be one of {', '.join(kernel.NAME for kernel in KERNELS)}; got {name!r}")
    if kernel.refusal(problem) is None:
        return kernel
    told = [(other.NAME, other.refusal(problem) or "takes it") for other in KERNELS]
    why = "; ".join(f"{other} {reason}" for other, reason in told)
    raise LlmqError(f"the kernel {name} cannot run this layer: {why}")
