"""What is done to one decoder block: its linears grouped, transformed where the method says so, rounded and written back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call
from llmq.blocks.replay import walk
from llmq.blocks.statistics import SecondMoment, Watcher
from llmq.blocks.topology import input_groups, linears
from llmq.config import QuantConfig, method, resolve
from llmq.core.grid import Grid, clipped_share
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.methods.base import Rounded, Rounding, Target, output_errors
from llmq.methods.rtn import rtn
from llmq.quantization.holdout import Holdout, some_rows
from llmq.quantization.plan import Plan
from llmq.transforms.base import PairReport, Proposal, Task, Transform
from llmq.transforms.pairs import NoPair, Pair, find_pairs

SEARCH_BATCHES = 2


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear.

    error: ||(W - Q) X||^2 / ||W X||^2 on the calibration inputs (on the weights alone for a data-free method);
    rtn_error: the same of plain round-to-nearest with min-max scales; ends: share of codes at either end of the range;
    clipped: share of weights outside it; tokens: tokens in the Hessian; seconds: observing and rounding; gap: held-out over
    fitted error, where tokens are few (`llmq.quantization.holdout`).
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
    gap: float | None = None


class BlockWork:
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
        self.folded: list[PairReport] = []
        self._block, self._name, self._config, self._dtype, self._done = block, name, config, dtype, done
        self._method = method(config.method)
        self._rounding: Rounding = resolve(self._method.rounding)
        self._planned = plan.of_block(name)
        self._linears = linears(block)
        self._moment: SecondMoment | None = None
        self._holdout: Holdout | None = None
        self._sizes = 0, 1  # tokens in all calibration windows, and in one
        self._since = time.perf_counter()

    def groups(self, probe: Call, few: Tensor) -> list[tuple[str, ...]]:
        """The linears to be quantized by the input that they share, in execution order; learned from a few tokens."""
        self._refuse_not_finite()
        found = input_groups(self._block, probe, few, list(self._linears), self._planned) if self._planned else []
        self._refuse_torn(found)
        planned = [tuple(name for name in group if name in self._planned) for group in found]
        return [group for group in planned if group]

    def transform(
        self,
        groups: list[tuple[str, ...]],
        calls: Sequence[Call],
        hidden: Sequence[Tensor],
        probe: Call,
        few: Tensor,
        known: Sequence[Pair | NoPair],
    ) -> list[Pair | NoPair]:
        """Change the block as the method's transform does; returns the pairs found, which the next block may share."""
        if self._method.transform is None or not groups:
            return []
        change: Transform = resolve(self._method.transform)
        pairs = find_pairs(self._block, probe, few, groups, known)
        found = [pair for pair in pairs if isinstance(pair, Pair)]
        proposals = {
            pair.consumers: Proposal(PairReport(None, pair.consumers, None, None, None, pair.reason))
            for pair in pairs
            if isinstance(pair, NoPair)
        }
        grids = {name: self._planned[name].grid for group in groups for name in group}
        task = Task(grids, lambda w, h, grid: self._rounding(w, h, self._target(grid)).weight, self._dtype)
        watchers: list[Watcher] = []  # of the pair at hand

        def see(_: int, x: Tensor) -> None:
            if not watchers:
                watchers.append(Watcher(x.shape[-1], x.device))
            watchers[0].add(x)

        def choose(gate: int) -> None:
            pair = found[gate]
            observed = watchers.pop().value(f"{self._name}.{pair.consumers[0]}")
            proposals[pair.consumers] = change(self._block, pair, observed, task)

        if found:
            count = min(SEARCH_BATCHES, len(hidden))
            gates = [self._linears[pair.consumers[0]] for pair in found]
            walk(self._block, calls[:count], list(hidden[:count]), gates, see, choose)
        self.folded = [proposals[group].settled().inside(self._name) for group in groups]
        return pairs

    def round(self, groups: list[tuple[str, ...]], calls: Sequence[Call], hidden: list[Tensor]) -> list[Tensor]:
        """Quantize the block's linears; returns its outputs (its inputs again, for a data-free method)."""
        if not self._method.calibrated:
            for group in groups:
                self._round(group, None, 0)
            return hidden
        gates = [self._linears[group[0]] for group in groups]
        self._sizes = sum(x[..., 0].numel() for x in hidden), hidden[0].shape[-2]
        return walk(self._block, calls, hidden, gates, self._see, lambda g: self._change(groups[g]))

    def _target(self, grid: Grid) -> Target:
        assert self._config.scales is not None
        return Target(grid, self._dtype, self._config.scales, self._config.damping)

    def _see(self, gate: int, x: Tensor) -> None:
        if self._moment is None:
            self._moment = SecondMoment(x.shape[-1], x.device)
            self._holdout = Holdout(x.shape[-1], *self._sizes, x.device)
        self._moment.add(x)
        assert self._holdout is not None
        self._holdout.add(x)

    def _change(self, group: Sequence[str]) -> None:
        assert self._moment is not None
        moment, self._moment = self._moment, None
        self._round(group, moment.value(f"{self._name}.{group[0]}"), moment.tokens)
        self._holdout = None

    def _round(self, group: Sequence[str], hessian: Tensor | None, tokens: int) -> None:
        """Round the linears of one input group, one stacked weight per grid, and write them back."""
        sampled = []
        for grid in dict.fromkeys(self._planned[name].grid for name in group):
            names = [name for name in group if self._planned[name].grid == grid]
            weight = torch.cat([self._linears[name].weight.detach().float() for name in names])
            target = self._target(grid)
            try:
                rounded = self._rounding(weight, hessian, target)
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
            sampled.append((names, some_rows(weight), target))
        if hessian is not None:
            self._tell_gaps(sampled, hessian, tokens)

    def _tell_gaps(self, sampled: Sequence[tuple[Sequence[str], Tensor, Target]], hessian: Tensor, tokens: int) -> None:
        """Put the gap to held-out windows into the reports just made; `hessian` is used up. See `llmq.quantization.holdout`."""
        assert self._holdout is not None
        for names, some, target in sampled:
            full = [self._planned[name].name for name in names]
            gap: float | None = None
            notes: tuple[str, ...] = ()
            try:
                gap = self._holdout.gap(full[0], some, hessian, tokens, partial(self._rounded, target))
            except LlmqError as error:  # fewer windows may be too few to be rounded for: the real rounding had them all
                notes = (f"its gap to held-out windows cannot be measured: {error}",)
            self.reports = [
                replace(row, gap=gap, notes=row.notes + notes) if row.name in full else row for row in self.reports
            ]

    def _rounded(self, target: Target, weight: Tensor, hessian: Tensor) -> QuantizedWeight:
        return self._rounding(weight, hessian, target).weight

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
        error, rtn_error = output_errors(weight, (codes, baseline.rows(rows.start, rows.stop)), hessian)
        self.reports.append(
            LinearReport(
                planned.name,
                planned.shape,
                codes.bits,
                planned.grid.group_size,
                error,
                rtn_error,
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
