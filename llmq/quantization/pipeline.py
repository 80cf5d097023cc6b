"""The loop over decoder blocks: load, quantize, hand over, drop.

One block and its statistics are in memory at a time. `quantize_blocks` is a generator: its caller writes each result,
journals it, and shows progress. It knows nothing of files, formats, kernels or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from llmq.quantization.block import BlockInputs, BlockResult, BlockState, quantize_block
from llmq.quantization.plan import Plan
from llmq.quantization.rounding import Recipe


@dataclass(frozen=True)
class Step:
    """Progress of a run.

    Fields:
        block: the number of the block, from 0.
        blocks: how many there are.
        linear: the linear that was rounded last; None when the block begins.
    """

    block: int
    blocks: int
    linear: str | None


class BlockSource(Protocol):
    """Where blocks come from: one at a time, with real weights that may be changed."""

    def load_block(self, index: int) -> nn.Module: ...

    def release_block(self, index: int) -> None: ...


def quantize_blocks(
    source: BlockSource,
    state: BlockState,
    inputs: Sequence[BlockInputs],
    plan: Plan,
    recipe: Recipe,
    progress: Callable[[Step], None] = lambda step: None,
) -> Iterator[BlockResult]:
    """Quantize every block in order, and yield each result while the block, its weights replaced by what they were rounded
    to, is still loaded in `source`.

    state: for the first block; the caller keeps no reference to it, so that its hidden states are freed in time. inputs: how
    each block is called.
    """
    count = len(plan.blocks)
    for index in range(count):
        progress(Step(index, count, None))
        block = source.load_block(index)
        shown = partial(_report_step, progress, index, count)
        result = _in_exact_float32(partial(quantize_block, block, index, inputs[index], state, plan, recipe, shown))
        state = result.state
        del block
        yield result
        del result  # the codes of one block at a time
        source.release_block(index)


def _report_step(progress: Callable[[Step], None], index: int, count: int, linear: str) -> None:
    progress(Step(index, count, linear))


@torch.no_grad()
def _in_exact_float32(run: Callable[[], BlockResult]) -> BlockResult:
    """Compute statistics and factorizations in IEEE float32, whatever the program around us has set (TF32, bf16 matmuls)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision(before)
