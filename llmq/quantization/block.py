"""What is done to one decoder block: its linears are transformed where the method says so, rounded and written back.

    1. check that the block's parameters are finite, and that its linears share inputs as the plan says
    2. transform: change the block, its function preserved, so that rounding it costs less
    3. for each group of linears that read one input, in execution order, with the inputs that the already rounded
       linears before it give: gather statistics, round the stacked weights, write them back dequantized
    4. run on to the block's outputs, which are the next block's inputs

`quantize_block` is a function from values to a value: what must survive between blocks, and so what a resumed run must
restore, is `BlockState`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call, foreign_code
from llmq.blocks.replay import Inputs, Stage, staged
from llmq.blocks.statistics import Statistics, held_out_start, observe
from llmq.blocks.topology import Group, input_groups, linears
from llmq.blocks.transposed import straightened
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.quantization.experts import Unit, observe_experts, observe_pooled, pool, round_expert, taken_apart, units_of
from llmq.quantization.holdout import is_undersampled
from llmq.quantization.plan import Plan, Planned
from llmq.quantization.rounding import LinearReport, Recipe, round_group
from llmq.transforms.base import PairReport, Proposal, TransformContext
from llmq.transforms.discovery import find_pairs
from llmq.transforms.pairs import KnownPairs, NoPair, Pair

SEARCH_TOKENS = 8192
"""Calibration tokens that a transform's statistics are gathered from; whole batches, at least two where there are two."""


@dataclass(frozen=True)
class BlockInputs:
    """How one block is called.

    Fields:
        calls: for each batch of calibration windows.
        lanes: of each batch, ascending (`llmq.blocks.statistics`).
        probe: for the first few tokens of the first window, by which the block is taken apart.
        probe_tokens: how many those are.
    """

    calls: tuple[Call, ...]
    lanes: tuple[int, ...]
    probe: Call
    probe_tokens: int


@dataclass(frozen=True)
class BlockState:
    """What passes from one block to the next; exactly what a resumed run must restore.

    Fields:
        hidden: the next block's input for each batch, [..., batch, tokens, width]; Gemma 3n has several streams.
        pairs: those of the last block, which the next one is tried with first.
    """

    hidden: tuple[Tensor, ...]
    pairs: KnownPairs = field(default_factory=KnownPairs)


@dataclass(frozen=True)
class BlockResult:
    """One quantized block.

    Fields:
        index: of the block, from 0.
        codes: the quantized weights by full module name.
        layers: a report for each of them.
        pairs: a report for each group of linears that the transform looked at.
        state: for the next block.
    """

    index: int
    codes: dict[str, QuantizedWeight]
    layers: tuple[LinearReport, ...]
    pairs: tuple[PairReport, ...]
    state: BlockState


def quantize_block(
    block: nn.Module,
    index: int,
    inputs: BlockInputs,
    state: BlockState,
    plan: Plan,
    recipe: Recipe,
    progress: Callable[[str], None] = lambda linear: None,
) -> BlockResult:
    """Quantize the linears of `block`, whose parameters are changed: number `index` of the plan's blocks.

    progress: called with the full name of each linear once it is rounded.
    Raises `LlmqError`, naming module and cause, for parameters or inputs that are not finite, for a block that runs its
    linears otherwise than the plan says, and for weights that cannot be rounded.
    """
    name = plan.blocks[index]
    planned, groups, stacks = plan.of_block(name), plan.groups[index], plan.stacks[index]
    few = state.hidden[0][..., :1, : inputs.probe_tokens, :]
    _refuse_not_finite(block, name)
    codes: dict[str, QuantizedWeight] = {}
    layers: list[LinearReport] = []
    hidden = state.hidden
    with straightened(block), taken_apart(block, name, stacks, inputs.probe, few):
        _refuse_other_groups(block, name, inputs.probe, few, plan, index)
        folded, pairs = _transformed(block, name, inputs, few, state, groups, planned, recipe)
        modules = dict(block.named_modules())
        units = units_of(block, groups, stacks, inputs.probe, few)
        stages = [unit.stage(modules, recipe.all_experts) for unit in units]
        with closing(staged(block, inputs.calls, state.hidden, stages)) as runs:
            for rounded in _rounded_units(block, name, units, runs, inputs, state, planned, recipe):
                for quantized, report in rounded:
                    codes[report.name] = quantized
                    layers.append(report)
                    progress(report.name)
            if recipe.calibrated:
                hidden = tuple(y for (y,) in next(runs))
    return BlockResult(index, codes, tuple(layers), folded, BlockState(hidden, pairs))


def _rounded_units(
    block: nn.Module,
    name: str,
    units: Sequence[Unit],
    runs: Iterator[Inputs],
    inputs: BlockInputs,
    state: BlockState,
    planned: dict[str, Planned],
    recipe: Recipe,
) -> Iterator[list[tuple[QuantizedWeight, LinearReport]]]:
    """Round the linears of one unit after the other; seconds are shared among the linears of a unit."""
    pooled: dict[Group, Tensor] = {}
    for unit in units:
        began = time.perf_counter()
        first = block.get_submodule(unit.groups[0][0])
        assert isinstance(first, nn.Linear)
        rows = [[planned[linear] for linear in group] for group in unit.groups]
        made: list[tuple[QuantizedWeight, LinearReport]] = []
        if not recipe.calibrated:
            for row in () if unit.pooled else rows:
                made += round_group(block, name, row, None, recipe)
        elif not unit.experts:
            seen = _with_lanes(inputs.lanes, next(runs))
            statistics = _observe_all(seen, f"{name}.{unit.stop}", first, state)
            made += round_group(block, name, rows[0], statistics, recipe)
        else:
            tokens = zip(inputs.lanes, next(runs), strict=True)
            if unit.pooled:
                mean = observe_pooled(tokens, f"{name}.{unit.stop}", first.in_features)
                pooled = dict.fromkeys(unit.groups, mean)
                continue
            names = [f"{name}.{group[0]}" for group in unit.groups]
            each = observe_experts(tokens, names, first.in_features, len(state.hidden))
            mean = pooled[unit.groups[0]] if unit.groups[0] in pooled else pool(each)
            for row, own in zip(rows, each, strict=True):
                made += round_expert(block, name, row, own, mean, recipe)
            del each, own
        seconds = (time.perf_counter() - began) / max(1, len(made))
        yield [(quantized, replace(report, seconds=seconds)) for quantized, report in made]


def _observe_all(inputs: Iterator[tuple[int, Tensor]], name: str, linear: nn.Linear, state: BlockState) -> Statistics:
    """The statistics of one group's input; where tokens are few, also those of the held-out windows by themselves."""
    tokens = sum(x.shape[-3] * x.shape[-2] for x in state.hidden)
    few = is_undersampled(tokens, linear.in_features)
    return observe(inputs, name, held_out_start(state.hidden) if few else None)


def _with_lanes(lanes: Sequence[int], seen: Inputs) -> Iterator[tuple[int, Tensor]]:
    return ((lane, x) for lane, (x,) in zip(lanes, seen, strict=True))


def _transformed(
    block: nn.Module,
    name: str,
    inputs: BlockInputs,
    few: Tensor,
    state: BlockState,
    groups: Sequence[Group],
    planned: dict[str, Planned],
    recipe: Recipe,
) -> tuple[tuple[PairReport, ...], KnownPairs]:
    """Change the block as the recipe's transform does; what was done about each group, and the pairs that were found."""
    if recipe.transform is None or not groups:
        return (), state.pairs
    known = find_pairs(block, inputs.probe, few, groups, state.pairs)
    pairs = [pair for pair in known.pairs if isinstance(pair, Pair)]
    context = TransformContext(recipe.rounding, {linear: recipe.target(row) for linear, row in planned.items()})
    proposals = {
        pair.consumers: Proposal(PairReport(None, pair.consumers, None, None, None, pair.reason))
        for pair in known.pairs
        if isinstance(pair, NoPair)
    }
    count = _search_batches(state.hidden)
    hidden, calls, modules = state.hidden[:count], inputs.calls[:count], linears(block)
    stages = [Stage.at(modules[pair.consumers[0]]) for pair in pairs]
    if pairs:
        with closing(staged(block, calls, hidden, stages)) as runs:
            for pair, seen in zip(pairs, runs, strict=False):
                lanes = _with_lanes(inputs.lanes[:count], seen)
                statistics = observe(lanes, f"{name}.{pair.consumers[0]}", held_out_start(hidden), apart=True)
                proposals[pair.consumers] = recipe.transform(block, pair, statistics, context)
    return tuple(proposals[group].applied().inside(name) for group in groups), known


def _search_batches(hidden: Sequence[Tensor]) -> int:
    """How many batches, from the first, hold `SEARCH_TOKENS` tokens; two at least, so that one can be held out."""
    tokens = 0
    for count, x in enumerate(hidden, 1):
        tokens += x.shape[-3] * x.shape[-2]
        if tokens >= SEARCH_TOKENS and count > 1:
            return count
    return len(hidden)


def _refuse_not_finite(block: nn.Module, name: str) -> None:
    for inner, parameter in block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise LlmqError(f"{name}.{inner} holds NaN or inf: the source is broken, or overflows in its dtype")


def _refuse_other_groups(block: nn.Module, name: str, probe: Call, few: Tensor, plan: Plan, index: int) -> None:
    """Raise `LlmqError` unless the block, with its weights, runs its linears as it did when the plan was made."""
    planned = {linear for group in plan.groups[index] for linear in group}
    with foreign_code(f"{name} cannot be run on what the model gives it"):
        groups = input_groups(block, probe, few)
    found = [tuple(linear for linear in group if linear in planned) for group in groups]
    if [group for group in found if group] != list(plan.groups[index]):
        raise LlmqError(f"{name} runs its linears in another order, or on other inputs, than its structure implies")
