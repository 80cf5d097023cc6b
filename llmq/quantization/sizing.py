"""What a run will write and need, computed from names, shapes and dtypes: `--dry-run`, and the writer's plan.

Predicted peak memory is the sum of what is alive at the worst moment, each part named:

    process       this process as it stands, libraries loaded
    outer         embeddings, final norm, output head
    block         the largest block, twice: as loaded, and as the float32 weight being rounded
    moments       three K x K float32 matrices for the widest input (sum, Hessian, factor), five where tokens are few for it
    activations   the blocks' inputs and outputs for every calibration token
    inside        what suspended forwards hold inside the block (at most `walk.PAUSED_BYTES`)

or, where the model writes its own calibration text and that needs more: the process, the whole model, the cache of the
windows that it writes at a time, and their logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmq.blocks.replay import PAUSED_BYTES
from llmq.formats import compressed_tensors as ct
from llmq.formats.compressed_tensors import TensorSpec
from llmq.memory import peak_rss_bytes
from llmq.quantization.holdout import few
from llmq.quantization.plan import Plan, Planned

if TYPE_CHECKING:
    from llmq.hf.source import Source


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


def planned_specs(source: Source, plan: Plan) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint to be written, in the order of the source's own."""
    specs: dict[str, TensorSpec] = {}
    for stored in source.tensor_plan():
        specs.update(_becomes(stored.name, stored.spec, _planned(stored.parameter, plan), source.dtype))
    return specs


def _planned(parameter: str | None, plan: Plan) -> Planned | None:
    """The plan of the linear whose weight `parameter` is; None for any other tensor."""
    if parameter is None or not parameter.endswith(".weight"):
        return None
    return plan.linears.get(parameter.removesuffix(".weight"))


def _becomes(name: str, spec: TensorSpec, planned: Planned | None, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
    if planned is None:
        return {name: spec}
    local = ct.specs(planned.shape, planned.grid, dtype)
    return {f"{name.removesuffix('weight')}{suffix}": stored for suffix, stored in local.items()}


def make_preview(source: Source, plan: Plan, tokens: int) -> Preview:
    """The preview of a run over `tokens` calibration tokens (0 for a data-free method)."""
    rows = []
    for tensor in source.tensor_plan():
        name, spec, planned = tensor.name, tensor.spec, _planned(tensor.parameter, plan)
        stored = _becomes(name, spec, planned, source.dtype)
        becomes = str(spec.dtype).removeprefix("torch.")
        if planned is not None:
            becomes = f"int{planned.grid.bits} " + (
                f"g{planned.grid.group_size}" if planned.grid.group_size else "channel"
            )
        rows.append(PreviewRow(name, spec.shape, spec.nbytes, sum(s.nbytes for s in stored.values()), becomes))
    notes = [f"{row.name}: {row.note}" for row in plan.linears.values() if row.note]
    return Preview(tuple(rows), _memory(source, plan, tokens), (*source.notes, *notes))


def with_writing(made: Preview, source: Source, count: int, length: int, rows: int) -> Preview:
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


def _memory(source: Source, plan: Plan, tokens: int) -> dict[str, int]:
    blocks = [source.model.get_submodule(name) for name in plan.blocks]
    size = source.dtype.itemsize
    inside = {id(p) for block in blocks for p in block.parameters()}
    outer = sum(p.numel() for p in source.model.parameters() if id(p) not in inside) * size
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks) * size
    wide = max(row.shape[1] for row in plan.linears.values())
    widths = sum(m.out_features for m in blocks[0].modules() if isinstance(m, nn.Linear))
    hidden = source.config.get_text_config().hidden_size
    held = tokens * (widths + 4 * hidden) * size
    return {
        "process": peak_rss_bytes() or 0,
        "outer": outer,
        "block": 2 * largest,
        "moments": (4 if few(tokens, wide) else 3) * 4 * wide * wide if tokens else 0,
        "activations": 2 * tokens * hidden * size,
        "inside": held if held <= PAUSED_BYTES else 0,
    }
