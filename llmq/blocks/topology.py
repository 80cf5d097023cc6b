"""What shares an input: the linears of a block, grouped by the tensor that they read, in execution order.

Found by running the block once and watching, not from a table of names. Two linears read the same input when they are
given the same memory (storage, offset, shape, strides, version) while both inputs are held, so that an address cannot
have been reused in between.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call
from llmq.errors import LlmqError


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block (subclasses too) under their names inside it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def input_groups(
    block: nn.Module, call: Call, hidden: Tensor, names: Sequence[str], needed: Collection[str] | None = None
) -> list[tuple[str, ...]]:
    """Names of the linears `names`, grouped by the input that they share, groups and members in execution order.

    hidden: any hidden states of the right width, [batch, tokens, width]. needed: those to be quantized (default: all).
    Raises `LlmqError` where one of them does not run, or runs more than once: experts that only some tokens reach are not
    supported. Others that do so are left out.
    """
    needed = names if needed is None else needed
    seen: list[tuple[str, Tensor]] = []
    modules = linears(block)
    handles = [
        modules[name].register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, inputs[0])))
        for name in names
    ]
    try:
        with torch.no_grad():
            call(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    counts = {name: sum(name == other for other, _ in seen) for name in names}
    seen = [(name, x) for name, x in seen if name in needed or counts[name] == 1]
    for name, count in counts.items():
        if count != 1 and name in needed:
            raise LlmqError(
                f"{name} of {type(block).__name__} runs {count} times in one forward: linears that only some tokens "
                "reach (experts), or that are shared, are not supported; leave them out with --ignore"
            )
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, x in seen:
        groups.setdefault(_identity(x), []).append(name)
    return [tuple(members) for members in groups.values()]


def _identity(x: Tensor) -> tuple[object, ...]:
    return x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x._version
