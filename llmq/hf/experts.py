"""The names of fused experts in files: which stored tensor holds which rows of which expert.

transformers merges experts that are stored one by one (`experts.3.w1.weight`) when it loads them, and splits them again when
it saves. Its own reverse conversion is run here on a small tensor of numbered elements in the parameter's place: the numbers
in each result say which expert and which rows it holds. So every linear of an expert gets the name under which engines look
for it, whatever an architecture calls it. Experts that are stored fused have no such names; their linears are stored under
the names that they have in memory, which llmq reads, and other engines may not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from llmq.blocks.experts import install, join
from llmq.blocks.stacks import Part, Stack, find_stacks
from llmq.errors import LlmqError

SIDE = 12
"""Rows and columns of the numbered matrices; divisible by the numbers of parts that there are."""


@dataclass(frozen=True)
class Experts:
    """The fused experts of a model.

    Fields:
        stacks: all of them, parts named as in the files.
        stored: linear -> its name in the files.
        replaced: stored tensor -> the linears that are written in its place.
        fused: stored tensors that hold all experts of a layer.
    """

    stacks: tuple[Stack, ...] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: tuple[str, ...] = ()

    def notes(self, planned: Collection[str]) -> tuple[str, ...]:
        """What a user must know about the files. planned: the linears to be quantized."""
        mine = [name for name in self.fused if self.replaced[name][0] in planned]
        if not mine:
            return ()
        return (
            f"the source holds the experts of a layer in one tensor ({mine[0]}, ...): packed, each expert is stored by itself, "
            "under names that only llmq reads; transformers without llmq loads random experts",
        )


def find_experts(model: PreTrainedModel, renamed: Mapping[str, str]) -> Experts:
    """The fused experts of `model`, whose parameters may be on meta. renamed: as in `llmq.hf.stored_names.Names`.

    Raises `LlmqError` where it cannot be told how experts are multiplied, or which stored tensors hold them.
    """
    stacks: list[Stack] = []
    stored: dict[str, str] = {}
    replaced: dict[str, tuple[str, ...]] = {}
    fused: list[str] = []
    for stack in find_stacks(model):
        parameter = f"{stack.module}.{stack.parameter}"
        if parameter in renamed:  # stored as it is
            stacks.append(stack)
            linears = tuple(name for name, _ in stack.linears())
            stored |= dict(zip(linears, linears, strict=True))
            replaced[renamed[parameter]] = linears
            fused.append(renamed[parameter])
            continue
        known, names = _stored_parts(model, stack)
        stacks.append(known)
        stored |= names
        replaced |= {f"{name}.weight": (linear,) for linear, name in names.items()}
    return Experts(tuple(stacks), stored, replaced, tuple(fused))


def _stored_parts(model: PreTrainedModel, stack: Stack) -> tuple[Stack, dict[str, str]]:
    """`stack` with its parts named as in the files, and the stored name of every linear."""
    parameter = f"{stack.module}.{stack.parameter}"
    rows = SIDE * len(stack.parts)
    numbered = torch.arange(stack.experts * rows * SIDE, device="cpu").view(stack.experts, rows, SIDE)
    if stack.transposed:
        numbered = numbered.mT.contiguous()
    with torch.device("cpu"):  # a model is built on meta while it is loaded
        results = revert_weight_conversion(model, {parameter: numbered})
    if set(results) == {parameter}:
        raise LlmqError(f"{parameter} is stored under no name that transformers knows")
    small = replace(stack, columns=SIDE, parts=tuple(_resized(stack, index) for index in range(len(stack.parts))))
    named: dict[int, str] = {}  # part -> its name
    found: dict[tuple[int, int], str] = {}  # (expert, part) -> stored name
    for name, tensor in results.items():
        at = _located(small, numbered, tensor)
        pieces = name.removesuffix(".weight").split(".")
        if (
            at is None
            or len(pieces) < 2
            or pieces[-2] != str(at[0])
            or named.setdefault(at[1], pieces[-1]) != pieces[-1]
        ):
            raise LlmqError(
                f"{name} holds other rows of {parameter} than one linear of one expert: "
                "experts stored like this are not supported; leave them out with --ignore 're:.*experts.*'"
            )
        found[at] = name.removesuffix(".weight")
    parts = tuple(replace(part, name=named[index]) for index, part in enumerate(stack.parts))
    known = replace(stack, parts=parts)
    return known, {known.linear(e, parts[index]): name for (e, index), name in found.items()}


def _resized(stack: Stack, index: int) -> Part:
    part = stack.parts[index]
    return replace(part, start=index if part.step > 1 else index * SIDE, rows=SIDE)


def _located(stack: Stack, numbered: Tensor, found: Tensor) -> tuple[int, int] | None:
    """The expert and the part of whose rows `found` consists; None for anything else."""
    expert = int(found.flatten()[0]) // numbered[0].numel()
    matrix = numbered[expert].T if stack.transposed else numbered[expert]
    for index, part in enumerate(stack.parts):
        if torch.equal(part.of(matrix), found):
            return expert, index
    return None


def take_apart_packed(
    model: PreTrainedModel, renamed: Mapping[str, str], stored_tensors: Collection[str], format_names: Sequence[str]
) -> tuple[dict[str, str], Callable[[], None]]:
    """Take the experts of `model` (on meta) apart that are stored packed, expert by expert, into linears on meta.

    renamed: as in `find_experts`. stored_tensors: the names in the files. format_names: of the tensors of a packed linear.
    Returns the stored names of the linears, and a function that undoes it.
    """
    found = find_experts(model, renamed)
    apart: dict[str, str] = {}
    fused: dict[str, nn.Parameter] = {}
    taken: list[Stack] = []
    for stack in found.stacks:
        names = {linear: found.stored[linear] for linear, _ in stack.linears()}
        first = next(iter(names.values()))
        if not any(f"{first}.{local}" in stored_tensors for local in format_names):
            continue
        like = model.get_parameter(f"{stack.module}.{stack.parameter}")

        def make(expert: int, part: Part, stack: Stack = stack, like: Tensor = like) -> nn.Linear:
            return nn.Linear(stack.columns, part.rows, bias=False, device="meta", dtype=like.dtype)

        fused[f"{stack.module}.{stack.parameter}"] = install(model, stack, make)
        taken.append(stack)
        apart |= names
    return apart, partial(join, model, taken, fused)


def without_merging(conversions: Sequence[Any], stored: Sequence[str]) -> list[Any]:
    """transformers' conversions without those that would merge tensors of linears called `stored` in the files."""
    return [each for each in conversions if not (isinstance(each, WeightConverter) and _takes(each, stored))]


def _takes(converter: Any, stored: Sequence[str]) -> bool:
    tried = copy.deepcopy(converter)  # renaming marks a conversion as used
    return any(tried.rename_source_key(f"{name}.weight_packed")[1] is not None for name in stored)
