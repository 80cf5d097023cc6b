"""Every kernel against float64 on one device, on the shapes where kernels go wrong. `bench_kernels.py --check-only` runs it.

A case is a weight and the numbers of rows that it is multiplied with, 0 to 1024: groups of 32, 64, 128, 256 and one per
channel, float16 and bfloat16, symmetric and asymmetric. Each has a regular 4-bit shape, deep enough that K is split, and an
odd one (N and K that no tile divides) with 4 and with 8 bits; 2 and 3 bits for the kernels that take them. Asymmetric cases
have a bias. Fresh memory is filled with NaN, so that an element that is not written shows. Every product is computed twice
and must be bit-equal. On CUDA the products of 1 and 16 rows are also captured in a graph and replayed.

The process that runs a case compiles its kernels: `jobs` processes share the cases, and what they compile is in Triton's
cache for later processes. Left out: several devices, several streams.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llmq.bench.kernels.contenders import problem_of
from llmq.bench.kernels.timing import SELF_TEST, Budget, time_calls
from llmq.bench.kernels.truth import Truth, draw, draw_input, judge, truth
from llmq.kernels import reference
from llmq.kernels.kernel import Kernel, RuntimeLayout
from llmq.kernels.registry import KERNELS

GROUPS = (32, 64, 128, 256, 0)
DTYPES = ("float16", "bfloat16")
ROWS = (0, 1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 300, 1024)
FEW_ROWS = (0, 1, 9, 70)
REPLAYED = (1, 16)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class KernelCase:
    """A weight [n, k] and the numbers of rows of x that it is multiplied with."""

    n: int
    """Rows of the weight."""
    k: int
    """Columns of the weight."""
    group: int
    """Columns per scale; 0 per channel."""
    dtype: str
    """Of x and the scales: float16 or bfloat16."""
    symmetric: bool
    """Whether the weight has no zero points. If it has them, there is a bias too."""
    bits: int
    """Of a weight code."""
    rows: tuple[int, ...]
    """M."""
    graphs: bool = False
    """Whether products are also replayed from CUDA graphs."""

    def __str__(self) -> str:
        zeros = "sym" if self.symmetric else "asym"
        return f"{self.k}x{self.n} {self.bits} bits g{self.group or 'channel'} {zeros} {self.dtype}"


@dataclass(frozen=True)
class Outcome:
    """The result of one case."""

    case: str
    """The case as text."""
    dtype: str
    """Of x and the scales."""
    bits: int
    """Of a weight code."""
    kernels: tuple[str, ...]
    """The kernels that took the problem."""
    products: int
    """How many results were compared."""
    error: float
    """The largest error among them (`truth.Verdict`)."""
    wrong: tuple[str, ...]
    """Every failure, as text."""


def cases(small: bool) -> list[KernelCase]:
    """All cases. small: one shape and few rows each, for Triton's interpreter and for compute-sanitizer.

    compute-sanitizer sees every out-of-bounds read only if torch does not cache memory; then no graph can be captured.
    """
    listed = []
    for symmetric in (True, False):
        for dtype in DTYPES:
            for group in GROUPS:
                odd = (70, 37 if group == 0 else 5 * group)  # per channel K may be anything
                few = (80, 37 if group == 0 else group * -(-160 // group))
                shapes = [(*few, 4)] if small else [(320, 2048, 4), (*odd, 4), (*odd, 8)]
                rows = FEW_ROWS if small else ROWS
                listed += [KernelCase(n, k, group, dtype, symmetric, bits, rows, not small) for n, k, bits in shapes]
    for bits in (2, 3, 8):
        listed.append(KernelCase(70, 160, 32, "float16", bits != 3, bits, FEW_ROWS))
        listed.append(KernelCase(65, 384, 128, "bfloat16", bits == 3, bits, FEW_ROWS))
    return listed


def check_case(case: KernelCase, device: str, seed: int, repeats: int = 2) -> Outcome:
    """Run a case on a device, with inputs drawn from a seed, on every kernel that takes it.

    repeats: how often each product is computed; all results must be bit-equal.
    """
    place, dtype = torch.device(device), getattr(torch, case.dtype)
    generator = torch.Generator(place).manual_seed(seed)
    packed = draw(generator, case.n, case.k, case.group or case.k, case.symmetric, dtype, case.bits)
    x = draw_input(generator, max(case.rows), case.k, dtype)
    bias = None if case.symmetric else draw_input(generator, 1, case.n, dtype)[0]
    expected, problem = truth(x, packed, bias), problem_of(packed, dtype)
    names, wrong, worst = [], [], 0.0
    for kernel in KERNELS:
        if kernel.name == reference.KERNEL.name or kernel.refusal(problem) is not None:
            continue
        names.append(kernel.name)
        # Any error of a compiler or a driver is this case's result; the other cases still run.
        try:
            with poisoned():
                runtime = kernel.prepare(packed)
                for rows in case.rows:
                    error, failures = _check_product(kernel, x[:rows], runtime, bias, expected, repeats, case.graphs)
                    worst = max(worst, error)
                    wrong += [f"{kernel.name} M={rows} {failure}" for failure in failures]
        except Exception as error:
            wrong.append(f"{kernel.name}: {type(error).__name__}: {str(error)[:300]}")
    return Outcome(str(case), case.dtype, case.bits, tuple(names), len(case.rows) * len(names), worst, tuple(wrong))


def _check_product(
    kernel: Kernel,
    x: Tensor,
    runtime: RuntimeLayout,
    bias: Tensor | None,
    expected: Truth,
    repeats: int,
    graphs: bool,
) -> tuple[float, list[str]]:
    """(error, failures) of one product, computed `repeats` times."""
    y = kernel.run(x, runtime, bias)
    verdict = judge(y, expected)
    wrong = [] if verdict.wrong is None else [verdict.wrong]
    if not all(torch.equal(y, kernel.run(x, runtime, bias)) for _ in range(repeats - 1)):
        wrong.append("is not bit-equal when repeated")
    if graphs and len(x) in REPLAYED and x.device.type == "cuda":
        replayed = time_calls([lambda: kernel.run(x, runtime, bias)], x.device, SELF_TEST).output
        if not torch.equal(y, replayed):
            wrong.append("is not bit-equal in a CUDA graph")
    return (verdict.error if verdict.wrong is None else 0.0), wrong


@contextmanager
def poisoned() -> Iterator[None]:
    """While open, fresh memory is filled with NaN. torch only warns about operations that are not deterministic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def spread(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, seconds: float
) -> Iterator[tuple[Item, Result]]:
    """(item, result) in order, from `jobs` fresh processes (from this one if jobs is 1): the results ready within `seconds`.

    Processes that still run then are terminated: they would disturb the next timings. One that died counts as not ready.
    """
    budget = Budget(seconds)
    if jobs < 2:
        for item in items:
            if budget.over():
                return
            yield item, work(item)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # CUDA does not survive a fork
        results = pool.imap(work, items)
        for item in items:
            try:
                yield item, results.next(timeout=max(0.1, seconds - budget.spent()))
            except multiprocessing.TimeoutError:
                return
