"""Which kernel runs a packed matmul, and why not the others.

A kernel is a module with `NAME`, `refusal(problem)`, `prepare(packed) -> runtime` and `run(x, runtime)`; adding one is a
file and an entry here. The first kernel in `KERNELS` that refuses neither the problem nor the number of rows runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from llmq.errors import LlmqError
from llmq.kernels import cpu_int4, reference, slab
from llmq.kernels.problem import Problem

KERNELS: tuple[ModuleType, ...] = (cpu_int4, slab, reference)


@dataclass(frozen=True)
class Choice:
    """kernel: what runs. refused: (name, reason) of every kernel before it that does not."""

    kernel: ModuleType
    refused: tuple[tuple[str, str], ...]


def choose(problem: Problem, rows: int, kernel: str | None = None) -> Choice:
    """The kernel for `problem` with `rows` rows of x. kernel: force one by name; `LlmqError` with all reasons if it refuses."""
    refused: list[tuple[str, str]] = []
    for module in KERNELS:
        reason = module.refusal(problem)
        most = getattr(module, "MOST_ROWS", None)
        if reason is None and most is not None and rows > most and kernel is None:
            reason = f"is the faster one up to {most} rows, and there are {rows}"
        if reason is None and kernel is not None and kernel != module.NAME:
            reason = f"{kernel} was asked for"
        if reason is None:
            return Choice(module, tuple(refused))
        refused.append((module.NAME, reason))
    why = "; ".join(f"{name} {reason}" for name, reason in refused)
    raise LlmqError(f"no kernel runs {problem}: {why}")
