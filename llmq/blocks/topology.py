"""Which linears share an input: the linears of a block, grouped by the tensor that they read, in execution order.

Found by running the model or a block once, not from a table of names. Two linears read the same input when they are given
the same storage at the same offset, shape, strides and version, while all inputs are kept alive, so that no memory can have
been reused in between. Data plays no part: a model on meta will do.

A linear that does not run exactly once in a forward is in no group: its weight is read by other code than its own forward
(fused kernels), or it is reached by some tokens only (experts), or its runs read different inputs. A linear whose weight is
read outside its own forward, if only for its dtype, is in no group either: a packed linear has no such weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call

Group = tuple[str, ...]
"""Names, inside their block, of linears that read one input, in execution order."""


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block (subclasses too) under their names inside it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def input_groups(block: nn.Module, call: Call, hidden: Tensor) -> tuple[Group, ...]:
    """The linears of `block` that run once, grouped by the input that they share, groups and members in execution order.

    hidden: any hidden states of the right width, [batch, tokens, width].
    """
    with _watched(linears(block)) as seen, torch.no_grad():
        call(block, hidden)
    return _grouped(seen)


def run_order(block: nn.Module, call: Call, hidden: Tensor, names: Collection[str]) -> tuple[str, ...]:
    """`names` of modules of `block` that run for `hidden` [batch, tokens, width], in the order in which they first do."""
    seen: list[str] = []
    hooked = [(name, block.get_submodule(name)) for name in names]
    handles = [module.register_forward_pre_hook(lambda *_, name=name: seen.append(name)) for name, module in hooked]
    try:
        with torch.no_grad():
            call(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(dict.fromkeys(seen))


def model_groups(
    model: nn.Module, run: Callable[[Tensor], object], ids: Tensor, blocks: Collection[str]
) -> dict[str, tuple[Group, ...]]:
    """`input_groups` of the named blocks of `model` at once, from one forward of the whole model.

    run: runs the model on token ids [batch, tokens]. ids: of the model's device, meta included.
    Raises whatever the model raises.
    """
    inside = {name: linears(model.get_submodule(name)) for name in blocks}
    modules = {f"{block}.{name}": linear for block, found in inside.items() for name, linear in found.items()}
    with _watched(modules) as seen, torch.no_grad():
        run(ids)
    return {
        block: _grouped([(name[len(block) + 1 :], x) for name, x in seen if name.startswith(f"{block}.")])
        for block in inside
    }


def structure(block: nn.Module) -> tuple[object, ...]:
    """What blocks that are built alike have in common: the names and classes of all modules, and the shapes of parameters."""
    modules = tuple((name, type(module).__qualname__) for name, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """While open: the name and first argument of each of `modules` that runs is appended to the list."""
    seen: list[tuple[str, Tensor]] = []
    classes = {name: type(module) for name, module in modules.items()}
    running: set[str] = set()

    def began(name: str, inputs: tuple[Tensor, ...]) -> None:
        running.add(name)
        seen.append((name, inputs[0]))

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: began(name, inputs)))
        handles.append(module.register_forward_hook(lambda *_, name=name: running.discard(name)))
        module.__class__ = _noting_reads(type(module), name, running, seen)
    try:
        yield seen
    finally:
        for name, module in modules.items():
            module.__class__ = classes[name]
        for handle in handles:
            handle.remove()


def _noting_reads(
    cls: type[nn.Module], name: str, running: Collection[str], seen: list[tuple[str, Tensor]]
) -> type[nn.Module]:
    """A subclass of `cls` that counts a read of the weight outside the forward as one more run."""

    def read(self: nn.Module, key: str) -> Any:
        value = cls.__getattr__(self, key)
        if key == "weight" and name not in running and isinstance(value, Tensor):
            seen.append((name, value))
        return value

    return type(cls.__name__, (cls,), {"__getattr__": read, "__module__": cls.__module__})


def _grouped(seen: Sequence[tuple[str, Tensor]]) -> tuple[Group, ...]:
    counts = Counter(name for name, _ in seen)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, x in seen:
        if counts[name] == 1 and not isinstance(x, nn.Parameter):
            groups.setdefault(_identity(x), []).append(name)
    return tuple(tuple(members) for members in groups.values())


def _identity(x: Tensor) -> tuple[object, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), x._version
