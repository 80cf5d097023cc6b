"""Which linears share an input: the linears of a block, grouped by the tensor that they read, in execution order.

Found by running the model or a block once, not from a table of names. Two linears read the same input when they are given
the same storage at the same offset, shape, strides and version, while all inputs are kept alive, so that no memory can have
been reused in between. Data plays no part: a model on meta will do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call
from llmq.errors import LlmqError

Group = tuple[str, ...]
"""Names, inside their block, of linears that read one input, in execution order."""


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block (subclasses too) under their names inside it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def input_groups(
    block: nn.Module, call: Call, hidden: Tensor, needed: Collection[str] | None = None
) -> tuple[Group, ...]:
    """The linears of `block` grouped by the input that they share, groups and members in execution order.

    hidden: any hidden states of the right width, [batch, tokens, width]. needed: the linears that must run exactly once
    (default: all); others that do not are left out.
    Raises `LlmqError` where one of `needed` does not run, or runs more than once.
    """
    modules = linears(block)
    with _watched(modules) as seen, torch.no_grad():
        call(block, hidden)
    return _grouped(seen, modules, modules if needed is None else needed, type(block).__name__)


def run_order(block: nn.Module, call: Call, hidden: Tensor, names: Collection[str]) -> tuple[str, ...]:
    """`names` of modules of `block` that run for `hidden` [batch, tokens, width], in the order in which they first do."""
    with _watched({name: block.get_submodule(name) for name in names}) as seen, torch.no_grad():
        call(block, hidden)
    return tuple(dict.fromkeys(name for name, _ in seen))


def model_groups(
    model: nn.Module, run: Callable[[Tensor], object], ids: Tensor, needed: Mapping[str, Collection[str]]
) -> dict[str, tuple[Group, ...]]:
    """`input_groups` of several blocks of `model` at once, from one forward of the whole model.

    run: runs the model on token ids [batch, tokens]. ids: of the model's device, meta included. needed: the names of blocks,
    and of the linears of each that must run exactly once.
    Raises `LlmqError` as `input_groups`, and whatever the model raises.
    """
    inside = {name: linears(model.get_submodule(name)) for name in needed}
    modules = {f"{block}.{name}": linear for block, found in inside.items() for name, linear in found.items()}
    with _watched(modules) as seen, torch.no_grad():
        run(ids)
    groups = {}
    for block, found in inside.items():
        mine = [(name[len(block) + 1 :], x) for name, x in seen if name.startswith(f"{block}.")]
        groups[block] = _grouped(mine, found, needed[block], type(model.get_submodule(block)).__name__)
    return groups


def structure(block: nn.Module) -> tuple[object, ...]:
    """What blocks that are built alike have in common: the names and classes of all modules, and the shapes of parameters."""
    modules = tuple((name, type(module).__qualname__) for name, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """While open: the name and first argument of each of `modules` that runs is appended to the list."""
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        return lambda _, args, kwargs: seen.append((name, args[0] if args else next(iter(kwargs.values()))))

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _grouped(
    seen: Sequence[tuple[str, Tensor]], names: Collection[str], needed: Collection[str], owner: str
) -> tuple[Group, ...]:
    counts = {name: sum(name == other for other, _ in seen) for name in names}
    for name, count in counts.items():
        if count != 1 and name in needed:
            raise LlmqError(
                f"{name} of {owner} runs {count} times in one forward: linears that only some tokens "
                "reach (experts), or that are shared, are not supported; leave them out with --ignore"
            )
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, x in seen:
        if counts[name] == 1 or name in needed:
            groups.setdefault(_identity(x), []).append(name)
    return tuple(tuple(members) for members in groups.values())


def _identity(x: Tensor) -> tuple[object, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), x._version
