"""Which linears are quantized, and how: decided before any weight is read.

Every linear inside the decoder blocks is quantized; the output head, and any linear outside the blocks, stays as it is.
`--ignore` adds to that. A group size that does not divide one linear's inputs gives way there to the largest smaller of
128, 64, 32 that does, else to one scale per channel, and the plan says so; one that divides no linear is refused.
Experts that are fused into 3-D parameters are quantized as one linear per expert and part (`llmq.blocks.experts`); all experts
of a layer get one scheme. Linears that choose or weight experts (routers, gates of shared experts) stay as they are, and so
do a linear that does not run exactly once in a forward, with a note, and what is no linear (convolutions, parameters of
recurrences). GPT-2's transposed linears are quantized as the linears that they are (`llmq.blocks.transposed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from llmq.blocks.capture import find_blocks
from llmq.blocks.stacks import Stack, stacks_of_blocks
from llmq.blocks.topology import Group
from llmq.blocks.transposed import straightened, transposed_linears
from llmq.config import FALLBACK_GROUP_SIZES, PER_CHANNEL, QuantConfig
from llmq.core.grid import Grid
from llmq.core.scheme import Scheme
from llmq.errors import LlmqError
from llmq.formats import DEFAULT_FORMAT
from llmq.formats.base import Format, matches


@dataclass(frozen=True)
class Planned:
    """One linear to be quantized."""

    name: str
    """Its full module name."""
    shape: tuple[int, int]
    """Of its weight: (N, K)."""
    scheme: Scheme
    """How it is quantized."""
    note: str | None = None
    """Why the group size is not the requested one; None where it is."""


@dataclass(frozen=True)
class Plan:
    """What is quantized, and in which format it is stored."""

    linears: dict[str, Planned]
    """Linears to be quantized, by module name."""
    ignored: tuple[str, ...]
    """The names of all other linears."""
    blocks: tuple[str, ...]
    """The names of the decoder blocks."""
    groups: tuple[tuple[Group, ...], ...]
    """For each block, its linears to be quantized by the input that they share, in execution order; without experts."""
    stacks: tuple[tuple[Stack, ...], ...]
    """For each block, the fused experts to be quantized, named inside the block."""
    format: Format
    """The format of the checkpoint to be written."""
    notes: tuple[str, ...] = ()
    """Which linears stay dense though nobody asked for it, and why."""

    def of_block(self, block: str) -> dict[str, Planned]:
        """The linears of one block, under their names inside it."""
        prefix = f"{block}."
        return {name[len(prefix) :]: row for name, row in self.linears.items() if name.startswith(prefix)}


Topology = Callable[[Collection[str]], Mapping[str, Sequence[Group]]]
"""Names of blocks -> the linears of each that run exactly once, by shared input."""


def make_plan(
    model: nn.Module,
    config: QuantConfig,
    dtype: torch.dtype,
    topology: Topology,
    output_format: Format = DEFAULT_FORMAT,
    stacks: Sequence[Stack] = (),
) -> Plan:
    """The plan for a model, whose parameters may be on meta.

    dtype: the model's; the format chooses that of the scales from it. topology: finds which linears share an input, by
    running the model (`llmq.blocks.topology`); it is called once all that names and shapes can rule out is refused.
    stacks: the fused experts of the model, by full names.
    Raises `LlmqError` for what cannot be done.
    """
    transposed = tuple(transposed_linears(model))
    with straightened(model):
        return _make_plan(model, config, dtype, topology, output_format, stacks, transposed)


def _make_plan(
    model: nn.Module,
    config: QuantConfig,
    dtype: torch.dtype,
    topology: Topology,
    output_format: Format,
    stacks: Sequence[Stack],
    transposed: Collection[str],
) -> Plan:
    prefix, blocks = find_blocks(model)
    names = tuple(f"{prefix}.{index}" for index in range(len(blocks)))
    all_linears = {name: _classes(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    shapes = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    stacks = [stack for stack in stacks if stack.module.startswith(f"{prefix}.")]
    experts = {name: shape for stack in stacks for name, shape in stack.linears()}
    all_linears |= dict.fromkeys(experts, ("Linear",))
    inside = {n: s for n, s in {**shapes, **experts}.items() if n.startswith(f"{prefix}.")}
    if not inside:
        raise LlmqError(f"the blocks of {type(model).__name__} hold no nn.Linear: there is nothing to quantize")
    kept = _ignored(all_linears, config.ignore) | _selectors(shapes, stacks)
    chosen = {name: shape for name, shape in inside.items() if name not in kept}
    if not chosen:
        raise LlmqError(f"--ignore {' '.join(config.ignore)} leaves no linear to quantize")
    holders = [block for block in names if any(name.startswith(f"{block}.") for name in chosen)]
    found = topology(holders)
    once = {f"{block}.{name}" for block in holders for group in found.get(block, ()) for name in group} | experts.keys()
    notes = (*_left_dense(chosen, once), *_transposed_note([name for name in transposed if name in once]))
    chosen = {name: shape for name, shape in chosen.items() if name in once}
    linears = _with_schemes(chosen, config, output_format, output_format.scale_dtype(dtype))
    stacks = _planned_stacks(stacks, linears)
    linears = _one_scheme_per_layer(linears, stacks, config)
    inner = {b: [n.removeprefix(f"{b}.") for n in linears if n.startswith(f"{b}.") and n not in experts] for b in names}
    groups = tuple(_planned_groups(block, found.get(block, ()), inner[block]) for block in names)
    ignored = tuple(name for name in all_linears if name not in linears)
    return Plan(linears, ignored, names, groups, stacks_of_blocks(stacks, names), output_format, notes)


def _classes(module: nn.Module) -> tuple[str, ...]:
    return tuple(base.__name__ for base in type(module).__mro__)


def _selectors(shapes: Mapping[str, tuple[int, int]], stacks: Sequence[Stack]) -> set[str]:
    """Linears next to experts that choose among them, or weight them: one output for each expert, or one in all."""
    found = set()
    for stack in stacks:
        layer = stack.module.rpartition(".")[0]
        beside = (name for name in shapes if name.startswith(f"{layer}."))
        found |= {name for name in beside if shapes[name][0] in (1, stack.experts)}
    return found


def _planned_stacks(stacks: Sequence[Stack], linears: Mapping[str, Planned]) -> list[Stack]:
    """The stacks that are quantized. Raises `LlmqError` for a layer whose experts are planned in part."""
    planned = []
    for module in dict.fromkeys(stack.module for stack in stacks):
        mine = [stack for stack in stacks if stack.module == module]
        names = [name for stack in mine for name, _ in stack.linears()]
        count = sum(name in linears for name in names)
        if 0 < count < len(names):
            raise LlmqError(
                f"engines hold the experts of a layer as one: ignore all linears of {module} or none; "
                f"{len(names) - count} of {len(names)} are ignored"
            )
        planned += mine if count else []
    return planned


def _one_scheme_per_layer(
    linears: Mapping[str, Planned], stacks: Sequence[Stack], config: QuantConfig
) -> dict[str, Planned]:
    """`linears` with one scheme for all experts of a layer: the largest group size that divides all of their inputs."""
    changed = dict(linears)
    for module in dict.fromkeys(stack.module for stack in stacks):
        mine = [stack for stack in stacks if stack.module == module]
        columns = math.gcd(*(stack.columns for stack in mine))
        grid, note = _grid(columns, config)
        if note is not None and columns not in {stack.columns for stack in mine}:
            note = f"{note} (of all experts)"
        for stack in mine:
            for name, _ in stack.linears():
                row = linears[name]
                changed[name] = replace(row, scheme=replace(row.scheme, weight=grid), note=note)
    return changed


def _transposed_note(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{len(names)} linears that the source stores as [in, out] ({names[0]}, ...) are packed as [out, in], which only llmq "
        "reads; transformers without llmq cannot load them",
    )


def _left_dense(chosen: Mapping[str, tuple[int, int]], once: Collection[str]) -> tuple[str, ...]:
    """A note on the linears that do not run exactly once; none where there are none.

    Raises `LlmqError` where they hold at least half of the weights: such a model would hardly become smaller.
    """
    left = [name for name in chosen if name not in once]
    if not left:
        return ()
    weights = {name: rows * columns for name, (rows, columns) in chosen.items()}
    share = sum(weights[name] for name in left) / sum(weights.values())
    which = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    if share >= 0.5:
        raise LlmqError(
            f"linears must run exactly once in one forward; {len(left)} of {len(chosen)} with {share:.0%} of the weights "
            f"do not ({which}): linears that only some tokens reach (experts), or that are shared, are not supported; "
            "leave them out with --ignore"
        )
    why = "the model does not call them exactly once in one forward, or reads their weights itself"
    return (f"{len(left)} linears stay dense, since {why}: {which}",)


def _planned_groups(block: str, groups: Sequence[Group], planned: Collection[str]) -> tuple[Group, ...]:
    """The planned linears of each group.

    Raises `LlmqError` for a group of one module's linears that is planned in part: engines fuse these.
    """
    for group in groups:
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in group):
            siblings = [name for name in group if name.rpartition(".")[0] == parent]
            left = [name for name in siblings if name not in planned]
            if left and len(left) < len(siblings):
                raise LlmqError(
                    f"{', '.join(siblings)} of {block} read the same input and serving engines fuse them: "
                    f"ignore all of them or none (only {', '.join(left)} ignored)"
                )
    kept = (tuple(name for name in group if name in planned) for group in groups)
    return tuple(group for group in kept if group)


def _ignored(linears: Mapping[str, Sequence[str]], patterns: Sequence[str]) -> set[str]:
    """The names that the patterns match. linears: the names of all, and of their classes."""
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name, classes in linears.items() if matches(pattern, name, classes)}
        if not hits:
            some = ", ".join(list(linears)[:3])
            raise LlmqError(
                f"--ignore {pattern!r} matches no linear of this model (they are called {some}, ...); "
                "give an exact name, a class name or re:REGEX"
            )
        found |= hits
    return found


def _with_schemes(
    shapes: dict[str, tuple[int, int]], config: QuantConfig, output_format: Format, scale_dtype: torch.dtype
) -> dict[str, Planned]:
    size = config.group_size
    widths = sorted({columns for _, columns in shapes.values()})
    if size != PER_CHANNEL and all(columns % size for columns in widths):
        fitting = [g for g in FALLBACK_GROUP_SIZES if any(columns % g == 0 for columns in widths)]
        remedy = f"use {', '.join(map(str, fitting))} or -1" if fitting else "use -1 (one scale per channel)"
        raise LlmqError(
            f"group_size must divide the in_features of some linear: this model has "
            f"{' and '.join(map(str, widths))}, group_size is {size}; {remedy}"
        )
    planned = {}
    for name, shape in shapes.items():
        grid, note = _grid(shape[1], config)
        scheme = Scheme(grid, None, scale_dtype)
        output_format.require(scheme)
        planned[name] = Planned(name, shape, scheme, note)
    return planned


def _grid(columns: int, config: QuantConfig) -> tuple[Grid, str | None]:
    """The grid of a weight with that many columns, and a note where the requested group size does not divide them."""
    size = config.group_size
    if size == PER_CHANNEL:
        return Grid(config.bits, None, config.symmetric), None
    if columns % size == 0:
        return Grid(config.bits, size, config.symmetric), None
    smaller = next((g for g in FALLBACK_GROUP_SIZES if g < size and columns % g == 0), None)
    how = f"groups of {smaller}" if smaller else "one scale per channel"
    return Grid(config.bits, smaller, config.symmetric), f"{size} does not divide {columns}: {how}"
