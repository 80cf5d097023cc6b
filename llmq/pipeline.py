"""The loop over decoder blocks: load, observe, round, write back, run on, hand over, drop.

    for each block:
        group its linears by the input that they share (topology)
        for each group, in execution order, on inputs from the already quantized predecessors (true-sequential):
            second moment of the input over all batches -> round the group's stacked weights -> write back dequantized
        the quantized block's outputs are the next block's inputs
        hand the codes to the sink, drop the block

One block and its Hessians are alive at a time. A method that needs no data sees one short batch only, to learn what
shares an input. Knows nothing of files, formats, kernels or transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from llmq.blocks import Call, Captured
from llmq.config import QuantConfig, method
from llmq.core.grid import clipped_share
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.methods import rounding
from llmq.methods.base import Rounded, Target, output_error
from llmq.methods.rtn import rtn
from llmq.plan import Plan
from llmq.statistics import SecondMoment
from llmq.topology import input_groups, linears
from llmq.walk import walk


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear.

    error: ||(W - Q) X||^2 / ||W X||^2 on the calibration inputs (on the weights alone for a data-free method);
    rtn_error: the same of plain round-to-nearest with min-max scales; ends: share of codes at either end of the range;
    clipped: share of weights outside it; tokens: tokens in the Hessian; seconds: observing and rounding.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    error: float
    rtn_error: float
    ends: float
    clipped: float
    tokens: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """Progress: `linear` of block `block` (from 0) of `blocks` was rounded; None when the block begins."""

    block: int
    blocks: int
    linear: str | None


class Blocks(Protocol):
    """Where blocks come from: one at a time, with real weights that may be changed."""

    def load_block(self, index: int) -> nn.Module: ...

    def release_block(self, index: int) -> None: ...


Sink = Callable[[int, nn.Module, dict[str, QuantizedWeight]], None]


def quantize_blocks(
    source: Blocks,
    captured: Captured,
    plan: Plan,
    config: QuantConfig,
    dtype: torch.dtype,
    sink: Sink,
    progress: Callable[[Step], None] = lambda step: None,
) -> list[LinearReport]:
    """Quantize every block in order; `sink(index, block, codes by full name)` gets each one before it is dropped.

    captured: the first block's inputs and every block's calls; its hidden states are consumed. dtype: of the scales.
    """
    rows: list[LinearReport] = []
    hidden = captured.hidden
    count = len(plan.blocks)
    with _exact_float32():
        for index, name in enumerate(plan.blocks):
            progress(Step(index, count, None))
            block = source.load_block(index)
            worker = _BlockWork(block, name, plan, config, dtype, partial(_tell, progress, index, count))
            hidden[:] = worker.run(captured.calls[index], hidden)
            rows += worker.reports
            sink(index, block, worker.codes)
            source.release_block(index)
    return rows


def _tell(progress: Callable[[Step], None], index: int, count: int, linear: str) -> None:
    progress(Step(index, count, linear))


class _BlockWork:
    """The state of quantizing one block: the moment being gathered, and the codes and reports so far."""

    def __init__(
        self,
        block: nn.Module,
        name: str,
        plan: Plan,
        config: QuantConfig,
        dtype: torch.dtype,
        done: Callable[[str], None],
    ) -> None:
        self.codes: dict[str, QuantizedWeight] = {}
        self.reports: list[LinearReport] = []
        self._block, self._name, self._config, self._dtype, self._done = block, name, config, dtype, done
        self._planned = plan.of_block(name)
        self._linears = linears(block)
        self._moment: SecondMoment | None = None
        self._since = time.perf_counter()

    def run(self, calls: Sequence[Call], hidden: list[Tensor]) -> list[Tensor]:
        """Quantize the block's linears; returns its outputs (its inputs again, for a data-free method)."""
        self._refuse_not_finite()
        groups = (
            input_groups(self._block, calls[0], hidden[0], list(self._linears), self._planned) if self._planned else []
        )
        self._refuse_torn(groups)
        members = [[n for n in group if n in self._planned] for group in groups]
        members = [group for group in members if group]
        if not self._calibrated:
            for group in members:
                self._round(group, None, 0)
            return hidden
        gates = [self._linears[group[0]] for group in members]
        return walk(self._block, calls, hidden, gates, self._see, lambda g: self._change(members[g]))

    @property
    def _calibrated(self) -> bool:
        return method(self._config.method).calibrated

    def _see(self, gate: int, x: Tensor) -> None:
        if self._moment is None:
            self._moment = SecondMoment(x.shape[-1], x.device)
        self._moment.add(x)

    def _change(self, group: list[str]) -> None:
        assert self._moment is not None
        moment, self._moment = self._moment, None
        self._round(group, moment.value(f"{self._name}.{group[0]}"), moment.tokens)

    def _round(self, group: list[str], hessian: Tensor | None, tokens: int) -> None:
        """Round the linears of one input group, one stacked weight per grid, and write them back."""
        for grid in dict.fromkeys(self._planned[name].grid for name in group):
            names = [name for name in group if self._planned[name].grid == grid]
            weight = torch.cat([self._linears[name].weight.detach().float() for name in names])
            assert self._config.scales is not None
            target = Target(grid, self._dtype, self._config.scales, self._config.damping)
            try:
                rounded = rounding(self._config.method)(weight, hessian, target)
                plain = replace(target, scales="minmax")
                is_plain = self._config.method == "rtn" and target == plain
                baseline = rounded if is_plain else rtn(weight, None, plain)
            except LlmqError as error:
                raise LlmqError(f"{self._name}.{names[0]}: {error}") from error
            now = time.perf_counter()
            seconds, self._since = (now - self._since) / len(names), now
            start = 0
            for name in names:
                rows = slice(start, start + self._planned[name].shape[0])
                self._finish(name, weight[rows], rounded, baseline.weight, rows, hessian, tokens, seconds)
                start = rows.stop

    def _finish(
        self,
        name: str,
        weight: Tensor,
        rounded: Rounded,
        baseline: QuantizedWeight,
        rows: slice,
        hessian: Tensor | None,
        tokens: int,
        seconds: float,
    ) -> None:
        planned, linear = self._planned[name], self._linears[name]
        codes = rounded.weight.rows(rows.start, rows.stop)
        notes = rounded.notes if planned.note is None else (planned.note, *rounded.notes)
        self.reports.append(
            LinearReport(
                planned.name,
                planned.shape,
                codes.bits,
                planned.grid.group_size,
                output_error(weight, codes, hessian),
                output_error(weight, baseline.rows(rows.start, rows.stop), hessian),
                _share_at_ends(codes),
                clipped_share(weight, codes),
                tokens,
                seconds,
                notes,
            )
        )
        linear.weight.data.copy_(codes.dequantize(linear.weight.dtype))
        self.codes[planned.name] = codes
        self._done(planned.name)

    def _refuse_not_finite(self) -> None:
        for name, parameter in self._block.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise LlmqError(
                    f"{self._name}.{name} holds NaN or inf: the source is broken, or overflows in its dtype"
                )

    def _refuse_torn(self, groups: list[tuple[str, ...]]) -> None:
        """Engines fuse linears of one module that read one input; half of them quantized could not be loaded."""
        for group in groups:
            for parent in dict.fromkeys(name.rpartition(".")[0] for name in group):
                siblings = [name for name in group if name.rpartition(".")[0] == parent]
                left = [name for name in siblings if name not in self._planned]
                if left and len(left) < len(siblings):
                    raise LlmqError(
                        f"{', '.join(siblings)} of {self._name} read the same input and serving engines fuse them: "
                        f"ignore all of them or none (only {', '.join(left)} ignored)"
                    )


def _share_at_ends(codes: QuantizedWeight) -> float:
    ends = (codes.codes == 0) | (codes.codes == (1 << codes.bits) - 1)
    return float(ends.float().mean())


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Statistics and factorizations in IEEE float32, whatever the program around us has set (TF32, bf16 matmuls)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
