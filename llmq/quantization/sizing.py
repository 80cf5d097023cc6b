"""What a run will write and need, computed from names, shapes and dtypes: `--dry-run`, and the writer's plan.

Predicted peak memory is the sum of what is alive at the worst moment, each part named:

    process       this process as it stands, libraries loaded
    outer         embeddings, final norm, output head
    block         the largest block, twice: as loaded, and as the float32 weight being rounded
    moments       K x K float32 matrices for the widest input: three (Hessian, factor, half of one to invert it), one more
                  where tokens are few for it, five with a transform (two moments, one scaled, and the factor)
    activations   the blocks' inputs and outputs for every calibration token
    suspended     what suspended forwards hold inside the block, where that fits (`llmq.blocks.replay`)
    probe         with a transform: the float64 copy of a block that pairs are found on

or, where the model writes its own calibration text and that needs more: the process, the whole model, the cache of the
windows that it writes at a time, and their logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from llmq.blocks.replay import SHARE_OF_MEMORY, elements_per_batch
from llmq.config import QuantConfig, method
from llmq.formats import compressed_tensors as ct
from llmq.formats.compressed_tensors import TensorSpec
from llmq.memory import available_bytes, peak_rss_bytes
from llmq.quantization.holdout import is_undersampled
from llmq.quantization.plan import Plan, Planned


class Sized(Protocol):
    """What is asked of a source (`llmq.hf.source_base.Source`)."""

    model: nn.Module
    config: Any
    dtype: torch.dtype

    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def tensor_plan(self) -> Mapping[str, tuple[str, TensorSpec]]: ...


@dataclass(frozen=True)
class PreviewRow:
    """One tensor of the source and what it becomes: shape, bytes before and after, and the grid in words."""

    name: str
    shape: tuple[int, ...]
    before: int
    after: int
    becomes: str


@dataclass(frozen=True)
class Preview:
    """rows: every tensor. memory: predicted peak bytes by part (see the module). notes: what is not done as asked."""

    rows: tuple[PreviewRow, ...]
    memory: dict[str, int]
    notes: tuple[str, ...]

    @property
    def before(self) -> int:
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        return sum(row.after for row in self.rows)

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def planned_specs(source: Sized, plan: Plan) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint to be written, in the order of the source's own."""
    specs: dict[str, TensorSpec] = {}
    for name, (module_name, spec) in source.tensor_plan().items():
        specs.update(_becomes(name, spec, _planned(module_name, plan), source.dtype))
    return specs


def _planned(parameter: str, plan: Plan) -> Planned | None:
    """The plan of the linear whose weight `parameter` is; None for any other tensor."""
    return plan.linears.get(parameter.removesuffix(".weight")) if parameter.endswith(".weight") else None


def _becomes(name: str, spec: TensorSpec, planned: Planned | None, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
    if planned is None:
        return {name: spec}
    local = ct.specs(planned.shape, planned.grid, dtype)
    return {f"{name.removesuffix('weight')}{suffix}": stored for suffix, stored in local.items()}


def make_preview(source: Sized, plan: Plan, config: QuantConfig, windows: int, length: int) -> Preview:
    """The preview of a run over `windows` calibration windows of `length` tokens."""
    rows = []
    for name, (module_name, spec) in source.tensor_plan().items():
        planned = _planned(module_name, plan)
        stored = _becomes(name, spec, planned, source.dtype)
        becomes = str(spec.dtype).removeprefix("torch.")
        if planned is not None:
            becomes = f"int{planned.grid.bits} " + (
                f"g{planned.grid.group_size}" if planned.grid.group_size else "channel"
            )
        rows.append(PreviewRow(name, spec.shape, spec.nbytes, sum(s.nbytes for s in stored.values()), becomes))
    notes = [f"{row.name}: {row.note}" for row in plan.linears.values() if row.note]
    return Preview(tuple(rows), _memory(source, plan, config, windows, length), (*source.notes, *notes))


def with_writing(made: Preview, source: Sized, count: int, length: int, rows: int) -> Preview:
    """`made`, of a run before which the model writes `count` windows of `length` tokens, `rows` at a time."""
    text = source.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = 2 * (getattr(text, "num_key_value_heads", None) or heads) * width  # per token and layer
    together = min(rows, count)
    writing = {
        "process": made.memory["process"],
        "model": sum({id(p): p.numel() for p in source.model.parameters()}.values()) * source.dtype.itemsize,
        "cache": together * length * len(source) * kept * source.dtype.itemsize,
        "logits": together * text.vocab_size * 2 * torch.float64.itemsize,
    }
    batches = -(-count // rows)
    note = (
        f"the model writes {count * length} calibration tokens first, loaded whole: {batches * (length - 1)} forwards of up to "
        f"{together} tokens; how long they take is measured, and said, as they begin"
    )
    memory = writing if sum(writing.values()) > made.peak else made.memory
    return replace(made, memory=memory, notes=(*made.notes, note))


def _memory(source: Sized, plan: Plan, config: QuantConfig, windows: int, length: int) -> dict[str, int]:
    row = method(config.method)
    blocks = [source.model.get_submodule(name) for name in plan.blocks]
    size = source.dtype.itemsize
    inside = {id(p) for block in blocks for p in block.parameters()}
    outer = sum(p.numel() for p in source.model.parameters() if id(p) not in inside) * size
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    parts = {"process": peak_rss_bytes() or 0, "outer": outer, "block": 2 * largest * size}
    if not row.calibrated:
        return parts
    wide = max(linear.shape[1] for linear in plan.linears.values())
    matrices = 5 if row.transform else 4 if is_undersampled(windows * length, wide) else 3
    hidden = source.config.get_text_config().hidden_size
    suspended = elements_per_batch(blocks[0], windows, length, hidden) * size
    available = available_bytes(torch.device("cpu"))
    fits = suspended <= (1 << 30 if available is None else available * SHARE_OF_MEMORY)
    return parts | {
        "moments": matrices * 4 * wide * wide,
        "activations": 2 * windows * length * hidden * size,
        "suspended": suspended if fits else 0,
        "probe": 8 * largest if row.transform else 0,
    }
