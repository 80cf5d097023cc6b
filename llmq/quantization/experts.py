"""Quantizing the experts of a layer: each one by itself, with statistics of the tokens that the router sent to it.

All experts stop at their module: it is run once more for each set of linears whose moments fit into `MOMENT_BYTES`, first for
the inputs of gates and ups, then, these being rounded, for the inputs of downs.

An expert sees a fraction of the tokens. With fewer than `MIN_TOKENS_PER_INPUT` for each input, its second moment is shrunk
towards the mean of its layer's experts, as if K tokens of the mean had been seen as well; without any token it is that mean.
Error feedback that few tokens guide can be worse than none: where tokens are few, some rows are rounded against the first
three quarters of the batches, and where nearest rounding does better on the others, the expert gets the nearest codes.
Both are counted in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call
from llmq.blocks.experts import join, split
from llmq.blocks.replay import Arguments, Stage
from llmq.blocks.stacks import Stack
from llmq.blocks.statistics import HELD_OUT, SecondMoment, Statistics
from llmq.blocks.topology import Group, run_order
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.methods.base import output_errors, sampled_rows
from llmq.methods.rtn import rtn
from llmq.quantization.holdout import is_undersampled
from llmq.quantization.plan import Planned
from llmq.quantization.rounding import LinearReport, Recipe, round_group

MOMENT_BYTES = 2 << 30
"""Of second moments of experts in memory at a time; at least one expert's."""
MATRICES = 4
"""K x K matrices of one expert while it is observed: all tokens and held-out ones, each with the lane being summed."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Of a block taken apart, as a share of its output's norm; 0.05 for narrower dtypes."""
SHRUNK = "few calibration tokens reached it: its second moment was shrunk towards the mean of its layer's experts"
UNREACHED = "no calibration token reached it: the mean second moment of its layer's experts was used"
NEAREST = "error feedback did worse than nearest rounding on held-out tokens: nearest codes were taken"
COUNTED = (UNREACHED, SHRUNK, NEAREST)
"""Notes that many experts have: a run counts them (`expert_notes`)."""


@dataclass(frozen=True)
class Unit:
    """Linears whose inputs are observed at one stop of a block.

    Fields:
        stop: the module that forwards stop before.
        groups: the linears of each input; one group but for experts.
        pooled: only the mean second moment of all inputs is needed; nothing is rounded.
        experts: how many experts there are at the stop; 0 for an ordinary linear.
    """

    stop: str
    groups: tuple[Group, ...]
    pooled: bool = False
    experts: int = 0

    def stage(self, modules: Mapping[str, nn.Module], all_experts: bool) -> Stage:
        """Where forwards stop, and what is observed. modules: of the block. all_experts: as in `Recipe`."""
        members = tuple(modules[group[0]] for group in self.groups)
        spread = partial(to_all_experts, self.experts) if all_experts and self.experts else None
        return Stage(modules[self.stop], members, spread)


def to_all_experts(experts: int, arguments: Arguments) -> Arguments:
    """The arguments of a module of experts with every token sent to every expert, equally weighted.

    The module must take the chosen experts, an integer tensor [tokens, k], and their weights, a floating tensor of that
    shape. One that takes neither is given all tokens for each expert already. Raises `LlmqError` for any other.
    """
    args, kwargs = arguments
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    chosen = next((t for t in tensors if t.ndim == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    if chosen is None and len(tensors) == 1:
        return arguments
    if chosen is None:
        raise LlmqError("its experts take no table of chosen experts: leave --moe-all-experts out for this model")
    everyone = torch.arange(experts, dtype=chosen.dtype, device=chosen.device).expand(len(chosen), experts)

    def spread(value: Any) -> Any:
        if value is chosen:
            return everyone
        if isinstance(value, Tensor) and value.shape == chosen.shape and value.is_floating_point():
            return torch.full_like(everyone, 1, dtype=value.dtype).div_(experts)
        return value

    return tuple(map(spread, args)), {key: spread(value) for key, value in kwargs.items()}


def units_of(
    block: nn.Module, groups: Sequence[Group], stacks: Sequence[Stack], call: Call, hidden: Tensor
) -> tuple[Unit, ...]:
    """The units of a block that is taken apart, in execution order. call, hidden: how it runs on a few tokens."""
    units = {group[0]: [Unit(group[0], (group,))] for group in groups}
    if not stacks:
        return tuple(unit for (unit,) in units.values())
    for stack in stacks:
        units.setdefault(stack.module, []).extend(_expert_units(stack))
    order = run_order(block, call, hidden, units)
    return tuple(unit for name in (*order, *(name for name in units if name not in order)) for unit in units[name])


def _expert_units(stack: Stack) -> Iterator[Unit]:
    groups = stack.groups()
    size = max(1, MOMENT_BYTES // (MATRICES * 4 * stack.columns**2))
    if size < len(groups):
        yield Unit(stack.module, groups, True, stack.experts)
    for start in range(0, len(groups), size):
        yield Unit(stack.module, groups[start : start + size], False, stack.experts)


@contextmanager
def taken_apart(block: nn.Module, name: str, stacks: Sequence[Stack], call: Call, hidden: Tensor) -> Iterator[None]:
    """While open, the experts of `block` are linears; that it computes the same is checked on a few tokens, `hidden`.

    Raises `LlmqError` where it does not.
    """
    if not stacks:
        yield
        return
    with torch.no_grad():
        want = call(block, hidden)
        fused = split(block, stacks)
        try:
            try:
                found = call(block, hidden)
            except (TypeError, RuntimeError, AttributeError, IndexError, ValueError) as error:
                raise LlmqError(_cannot(name, stacks, f"{type(error).__name__}: {error}")) from error
            lost = (found - want).norm() / want.norm().clamp_min(torch.finfo(want.dtype).tiny)
            if not bool(lost <= TOLERANCE.get(want.dtype, 0.05)):
                raise LlmqError(_cannot(name, stacks, f"its output changes by {float(lost):.1%}"))
            yield
        finally:
            join(block, stacks, fused)


def _cannot(name: str, stacks: Sequence[Stack], why: str) -> str:
    modules = ", ".join(dict.fromkeys(stack.module for stack in stacks))
    return (
        f"the experts of {name} ({modules}) cannot be taken apart: {why}; leave them out with --ignore 're:.*experts.*'"
    )


def observe_experts(
    inputs: Iterable[tuple[int, tuple[Tensor, ...]]], names: Sequence[str], columns: int, batches: int
) -> list[Statistics]:
    """The statistics of each of `names`: of all its tokens, and of those in the last quarter of the batches by themselves.

    inputs: for every batch, its lane and the tokens of each expert [tokens, K]. An expert without tokens has a zero moment.
    """
    held_from = batches - max(1, batches // HELD_OUT) if batches > 1 else batches
    seen: list[SecondMoment] | None = None
    for index, (lane, xs) in enumerate(inputs):
        if seen is None:
            seen = [SecondMoment(columns, x.device) for x in xs]
            held_out = [SecondMoment(columns, x.device) for x in xs]
        for expert, x in enumerate(map(_reached, xs)):
            if len(x):
                seen[expert].add(x, lane)
                if index >= held_from:
                    held_out[expert].add(x, lane)
    assert seen is not None
    return [_statistics(name, all_of, kept) for name, all_of, kept in zip(names, seen, held_out, strict=True)]


def _reached(x: Tensor) -> Tensor:
    """The tokens of x [..., K] that reach an expert: some modules give each expert all tokens, most of them zeroed."""
    x = x.reshape(-1, x.shape[-1])
    return x[(x != 0).any(-1)]


def _statistics(name: str, seen: SecondMoment, held_out: SecondMoment) -> Statistics:
    if not seen.tokens:
        return Statistics(seen.empty(), 0)
    kept = held_out.value(name) if 0 < held_out.tokens < seen.tokens else None
    return Statistics(seen.value(name), seen.tokens, kept, 0 if kept is None else held_out.tokens)


def pool(statistics: Sequence[Statistics]) -> Tensor:
    """The mean second moment over all tokens of all experts, float32 [K, K]."""
    total = torch.zeros_like(statistics[0].hessian)
    for each in statistics:
        total.add_(each.hessian, alpha=each.tokens)
    return total.div_(max(1, sum(each.tokens for each in statistics)))


def observe_pooled(inputs: Iterable[tuple[int, tuple[Tensor, ...]]], name: str, columns: int) -> Tensor:
    """As `pool`, of inputs as in `observe_experts`, without a moment for each expert."""
    moment: SecondMoment | None = None
    for lane, xs in inputs:
        moment = moment or SecondMoment(columns, xs[0].device)
        moment.add(torch.cat([_reached(x) for x in xs]), lane)
    assert moment is not None
    return moment.value(name)


def round_expert(
    block: nn.Module, name: str, group: Sequence[Planned], statistics: Statistics, pooled: Tensor, recipe: Recipe
) -> list[tuple[QuantizedWeight, LinearReport]]:
    """Round the linears of one expert that read one input, and write them back.

    statistics: of the expert's own tokens. pooled: float32 [K, K], the mean second moment of its layer's experts.
    """
    notes: list[str] = []
    ratio: float | None = None
    columns, tokens = pooled.shape[0], statistics.tokens
    used = replace(statistics, held_out=None, held_out_tokens=0)
    if tokens == 0:
        notes.append(UNREACHED)
        used = replace(used, hessian=pooled)
    elif is_undersampled(tokens, columns):
        notes.append(SHRUNK)
        used = replace(used, hessian=_shrunk(statistics.hessian, tokens, pooled))
        if statistics.held_out is not None and recipe.rounding is not rtn:
            ratio, nearest = _held_out_errors(block, name, group, statistics, pooled, recipe)
            if nearest:
                notes.append(NEAREST)
                recipe = replace(recipe, rounding=rtn)
    rounded = round_group(block, name, group, used, recipe)
    return [(codes, replace(report, notes=(*report.notes, *notes), holdout_ratio=ratio)) for codes, report in rounded]


def _shrunk(moment: Tensor, tokens: int, pooled: Tensor) -> Tensor:
    """The mean of `tokens` tokens with second moment `moment` [K, K] and of K tokens with that of `pooled`."""
    more = len(pooled)
    return moment.mul(tokens).add_(pooled, alpha=more).div_(tokens + more)


def _held_out_errors(
    block: nn.Module, name: str, group: Sequence[Planned], statistics: Statistics, pooled: Tensor, recipe: Recipe
) -> tuple[float | None, bool]:
    """The held-out error over the fitted one, and whether nearest rounding has the smaller held-out error."""
    held_out, count = statistics.held_out, statistics.held_out_tokens
    assert held_out is not None
    rest = statistics.tokens - count
    own = statistics.hessian.mul(statistics.tokens).sub_(held_out, alpha=count).div_(rest)
    own.diagonal().clamp_min_(0)
    fitted = Statistics(_shrunk(own, rest, pooled), rest)
    seen, unseen, nearest = 0.0, 0.0, 0.0
    for row in group:
        weight = block.get_submodule(row.name.removeprefix(f"{name}.")).weight
        assert isinstance(weight, Tensor)
        sample = weight.data[sampled_rows(len(weight), weight.device)].float()
        target = recipe.target(row)
        try:
            with_feedback = recipe.rounding(sample, fitted, target).weight
        except LlmqError:  # the tokens are too few to round for
            return None, True
        plain = rtn(sample, fitted, target).weight
        share = row.shape[0]
        seen += share * output_errors(sample, (with_feedback,), fitted.hessian)[0]
        errors = output_errors(sample, (with_feedback, plain), held_out)
        unseen, nearest = unseen + share * errors[0], nearest + share * errors[1]
    ratio = unseen / seen if seen > 0 and math.isfinite(unseen) else None
    return ratio, nearest < unseen


def is_expert(row: LinearReport) -> bool:
    """Whether a report is of an expert's linear whose tokens were few."""
    return any(note in COUNTED for note in row.notes)


def expert_notes(layers: Iterable[LinearReport]) -> tuple[str, ...]:
    """For each of the notes above, one line: how many experts' linears it was given to, and in how many layers."""
    lines = []
    rows = list(layers)
    for note in COUNTED:
        mine = [row.name for row in rows if note in row.notes]
        if mine:
            where = {name.rpartition(".")[0].rpartition(".")[0] for name in mine}
            lines.append(f"{len(mine)} linears of experts in {len(where)} layers: {note}")
    return tuple(lines)
