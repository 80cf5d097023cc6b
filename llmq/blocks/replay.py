"""Run one decoder block over all batches, stopping before chosen linears ("gates") to see their inputs and change weights.

A walk that stops at g gates costs one forward of the block, not g + 1: each batch's forward is suspended inside the
gate's pre-hook (a greenlet: one thread, no concurrency) and resumed after the change. What is alive meanwhile is that
batch's activations inside the block. Where those would exceed `PAUSED_BYTES`, the block is run again from its start for
each gate instead; the arithmetic is the same and so are the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call, Stop
from llmq.errors import LlmqError

PAUSED_BYTES = 1 << 30
OUT_OF_ORDER = "linears of a decoder block run in a different order from call to call, which is not supported"

Forward = Callable[[], Tensor]


def replay(block: nn.Module, calls: Sequence[Call], hidden: Sequence[Tensor]) -> list[Tensor]:
    """The block's output for every batch."""
    with torch.no_grad():
        return [forward() for forward in _forwards(block, calls, hidden)]


def walk(
    block: nn.Module,
    calls: Sequence[Call],
    hidden: list[Tensor],
    gates: Sequence[nn.Module],
    see: Callable[[int, Tensor], None],
    change: Callable[[int], None],
    paused: bool | None = None,
) -> list[Tensor]:
    """Run `block` over all batches, in stages.

    For each gate g in order: `see(g, x)` is called with the gate's input for every batch in turn, then `change(g)`, which
    may alter the gate's weights and those of anything that runs later. Returns the output of each batch, computed with
    all changes made. gates: linears of the block, in execution order, each run once per forward.
    paused: suspend forwards at gates (True) or run again for each (False); None decides by the memory it would take.
    """
    if paused is None:
        paused = _paused_bytes(block, hidden) <= PAUSED_BYTES
    forwards = _forwards(block, calls, hidden)
    with torch.no_grad():
        return (_walk_paused if paused else _walk_again)(forwards, gates, see, change)


def _forwards(block: nn.Module, calls: Sequence[Call], hidden: Sequence[Tensor]) -> list[Forward]:
    return [partial(call, block, x) for call, x in zip(calls, hidden, strict=True)]


def _paused_bytes(block: nn.Module, hidden: Sequence[Tensor]) -> int:
    """What all batches together hold inside the block, at most: every linear's output and four hidden states."""
    tokens = sum(x[..., 0].numel() for x in hidden)
    widths = sum(m.out_features for m in block.modules() if isinstance(m, nn.Linear)) + 4 * hidden[0].shape[-1]
    return tokens * widths * hidden[0].element_size()


def _walk_paused(
    forwards: Sequence[Forward],
    gates: Sequence[nn.Module],
    see: Callable[[int, Tensor], None],
    change: Callable[[int], None],
) -> list[Tensor]:
    from greenlet import getcurrent, greenlet  # here: what measures or serves needs none

    caller = getcurrent()
    suspended = [greenlet(forward) for forward in forwards]
    with _hooked(gates, lambda g, x: caller.switch((g, x))):
        for expected in range(len(gates)):
            for forward in suspended:
                reached = forward.switch()
                if not isinstance(reached, tuple) or reached[0] != expected:
                    raise LlmqError(OUT_OF_ORDER)
                see(*reached)
            change(expected)
        return [forward.switch() for forward in suspended]


def _walk_again(
    forwards: Sequence[Forward],
    gates: Sequence[nn.Module],
    see: Callable[[int, Tensor], None],
    change: Callable[[int], None],
) -> list[Tensor]:
    for index, gate in enumerate(gates):

        def stop(_: int, x: Tensor, index: int = index) -> None:
            see(index, x)
            raise Stop

        with _hooked([gate], stop):
            for forward in forwards:
                try:
                    forward()
                except Stop:
                    continue
                raise LlmqError(OUT_OF_ORDER)
        change(index)
    return [forward() for forward in forwards]


@contextmanager
def _hooked(gates: Sequence[nn.Module], reached: Callable[[int, Tensor], object]) -> Iterator[None]:
    """While open, `reached(index, input)` is called before each gate runs."""

    def hook(index: int) -> Callable[[nn.Module, Any], None]:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reached(index, inputs[0])

        return before

    handles = [gate.register_forward_pre_hook(hook(index)) for index, gate in enumerate(gates)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
