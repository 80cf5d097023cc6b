"""The loop over decoder blocks: load, transform, observe, round, write back, run on, hand over, drop.

    for each block:
        group its linears by the input that they share (topology)
        where the method has a transform: change the block so that rounding it costs less (transforms)
        for each group, in execution order, on inputs from the already quantized predecessors (true-sequential):
            second moment of the input over all batches -> round the group's stacked weights -> write back dequantized
        the quantized block's outputs are the next block's inputs
        hand the codes to the sink, drop the block

One block and its Hessians are alive at a time. A method that needs no data sees one short batch only, to learn what
shares an input. Knows nothing of files, formats, kernels or transformers. What is done to one block: `llmq.quantization.block`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from llmq.blocks.capture import Captured
from llmq.config import QuantConfig
from llmq.core.quantized import QuantizedWeight
from llmq.quantization.block import BlockWork, LinearReport
from llmq.quantization.plan import Plan
from llmq.transforms.base import PairReport
from llmq.transforms.pairs import NoPair, Pair

MAPPED = 4 << 20
M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Step:
    """Progress: `linear` of block `block` (from 0) of `blocks` was rounded; None when the block begins."""

    block: int
    blocks: int
    linear: str | None


class Blocks(Protocol):
    """Where blocks come from: one at a time, with real weights that may be changed."""

    def load_block(self, index: int) -> nn.Module: ...

    def release_block(self, index: int) -> None: ...


Sink = Callable[[int, nn.Module, dict[str, QuantizedWeight]], None]


def quantize_blocks(
    source: Blocks,
    captured: Captured,
    probe: Captured,
    plan: Plan,
    config: QuantConfig,
    dtype: torch.dtype,
    sink: Sink,
    progress: Callable[[Step], None] = lambda step: None,
) -> tuple[list[LinearReport], list[PairReport]]:
    """Quantize every block in order; `sink(index, block, codes by full name)` gets each one before it is dropped.

    captured: the first block's inputs and every block's calls; its hidden states are consumed. probe: the same of a few
    tokens, by which blocks are taken apart. dtype: of the scales.
    """
    rows: list[LinearReport] = []
    folded: list[PairReport] = []
    pairs: list[Pair | NoPair] = []
    hidden = captured.hidden
    count = len(plan.blocks)
    _return_what_is_freed()
    with _exact_float32():
        for index, name in enumerate(plan.blocks):
            progress(Step(index, count, None))
            block = source.load_block(index)
            work = BlockWork(block, name, plan, config, dtype, partial(_tell, progress, index, count))
            groups = work.groups(probe.calls[index][0], probe.hidden[0])
            pairs = work.transform(groups, captured.calls[index], hidden, probe.calls[index][0], probe.hidden[0], pairs)
            hidden[:] = work.round(groups, captured.calls[index], hidden)
            rows += work.reports
            folded += work.folded
            sink(index, block, work.codes)
            source.release_block(index)
            _glibc("malloc_trim", 0)
    return rows, folded


def _tell(progress: Callable[[Step], None], index: int, count: int, linear: str) -> None:
    progress(Step(index, count, linear))


def _return_what_is_freed() -> None:
    """Have every tensor of `MAPPED` bytes or more in pages of its own, which go back to the system when it is freed.

    glibc raises that limit as it goes, up to 32 MB, and the heap that smaller tensors then live in is torn into pieces,
    block after block: 1.52 GB at the most instead of 1.79 with the 3 GB Llama of 28 blocks. Lasts for the process.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, MAPPED)


def _glibc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None), name, None)  # musl has none
        if function is not None:
            function(*arguments)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Statistics and factorizations in IEEE float32, whatever the program around us has set (TF32, bf16 matmuls)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
