"""Every kernel against float64 on one device, on the shapes where kernels go wrong: what `bench_kernels.py --check-only` runs.

A case is a weight and the numbers of rows that it is multiplied with, 0 to 1024: groups of 32, 64, 128, 256 and one per
channel, float16 and bfloat16, symmetric and asymmetric. Two shapes each: a regular one of 4 bits, deep enough that K is
split, and an odd one (N and K that no tile divides) of 4 and of 8; 2 and 3 bits for the kernels that take them. Asymmetric
cases have a bias. Fresh memory is filled with NaN, so that what is not written shows; every product is computed twice and
must have the same bits. On CUDA the product of 1 and 16 rows is also captured in a graph and replayed.

Kernels are compiled by the process that runs a case: `jobs` processes share the cases, and what they compile is in Triton's
cache for everyone after. Left out: devices beside each other, streams beside each other.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmq.bench.kernels.benchmark import problem_of
from llmq.bench.kernels.timing import SELF_TEST, Budget, measure
from llmq.bench.kernels.truth import Truth, draw, draw_input, judge, truth
from llmq.kernels import reference
from llmq.kernels.problem import Kernel
from llmq.kernels.registry import KERNELS

GROUPS = (32, 64, 128, 256, 0)
DTYPES = ("float16", "bfloat16")
ROWS = (0, 1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 300, 1024)
FEW_ROWS = (0, 1, 9, 70)
REPLAYED = (1, 16)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """A weight [n, k] and the Ms that it meets. group: columns per scale, 0 per channel. dtype: of x and the scales.

    graphs: whether products are replayed from CUDA graphs, too.
    """

    n: int
    k: int
    group: int
    dtype: str
    symmetric: bool
    bits: int
    rows: tuple[int, ...]
    graphs: bool = False

    def __str__(self) -> str:
        zeros = "sym" if self.symmetric else "asym"
        return f"{self.k}x{self.n} {self.bits} bits g{self.group or 'channel'} {zeros} {self.dtype}"


@dataclass(frozen=True)
class Outcome:
    """case, dtype, bits: of the weight. products: how many were judged. error: the largest of theirs (`truth.Verdict`).
    wrong: what failed, in words.
    """

    case: str
    dtype: str
    bits: int
    kernels: tuple[str, ...]
    products: int
    error: float
    wrong: tuple[str, ...]


def cases(small: bool) -> list[Case]:
    """All of them; small: one shape and few rows each, for Triton's interpreter and for compute-sanitizer.

    The latter sees all of what is read out of bounds only where torch does not cache memory, and then no graph can be captured.
    """
    found = []
    for symmetric in (True, False):
        for dtype in DTYPES:
            for group in GROUPS:
                odd = (70, 37 if group == 0 else 5 * group)  # per channel K may be anything
                few = (80, 37 if group == 0 else group * -(-160 // group))
                listed = [(*few, 4)] if small else [(320, 2048, 4), (*odd, 4), (*odd, 8)]
                for n, k, bits in listed:
                    found.append(Case(n, k, group, dtype, symmetric, bits, FEW_ROWS if small else ROWS, not small))
    for bits in (2, 3, 8):
        found.append(Case(70, 160, 32, "float16", bits != 3, bits, FEW_ROWS))
        found.append(Case(65, 384, 128, "bfloat16", bits == 3, bits, FEW_ROWS))
    return found


def check(case: Case, device: str, seed: int) -> Outcome:
    """Run a case on a device, with inputs drawn from a seed, on every kernel that takes it."""
    place, dtype = torch.device(device), getattr(torch, case.dtype)
    generator = torch.Generator(place).manual_seed(seed)
    packed = draw(generator, case.n, case.k, case.group or case.k, case.symmetric, dtype, case.bits)
    x = draw_input(generator, max(case.rows), case.k, dtype)
    bias = None if case.symmetric else draw_input(generator, 1, case.n, dtype)[0]
    wanted, problem = truth(x, packed, bias), problem_of(packed, dtype)
    names, wrong, worst = [], [], 0.0
    for kernel in KERNELS:
        if kernel is reference or kernel.refusal(problem) is not None:
            continue
        names.append(kernel.NAME)
        # Whatever a compiler or a driver raises is this case's result; the others are still run.
        try:
            with poisoned():
                runtime = kernel.prepare(packed)
                for rows in case.rows:
                    error, found = _once(kernel, x[:rows], runtime, bias, wanted, case.graphs)
                    worst = max(worst, error)
                    wrong += [f"{kernel.NAME} M={rows} {why}" for why in found]
        except Exception as error:
            wrong.append(f"{kernel.NAME}: {type(error).__name__}: {str(error)[:300]}")
    return Outcome(str(case), case.dtype, case.bits, tuple(names), len(case.rows) * len(names), worst, tuple(wrong))


def _once(
    kernel: Kernel, x: Tensor, runtime: Any, bias: Tensor | None, wanted: Truth, graphs: bool
) -> tuple[float, list[str]]:
    y = kernel.run(x, runtime, bias)
    verdict = judge(y, wanted)
    wrong = [] if verdict.wrong is None else [verdict.wrong]
    if not torch.equal(y, kernel.run(x, runtime, bias)):
        wrong.append("gives other bits the second time")
    if graphs and len(x) in REPLAYED and x.device.type == "cuda":
        replayed = measure([lambda: kernel.run(x, runtime, bias)], x.device, SELF_TEST).output
        if not torch.equal(y, replayed):
            wrong.append("gives other bits in a CUDA graph")
    return (verdict.error if verdict.wrong is None else 0.0), wrong


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN. cuBLAS would refuse to run in this mode, if it did not only warn."""
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
    """(item, result) in order, from `jobs` fresh processes, or from this one where jobs is 1; what is there after `seconds`.

    Processes that are still at work then are ended: they would disturb what is timed next. One that died counts as such.
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
