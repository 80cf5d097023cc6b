"""What a run will write and how much memory it needs, computed from names, shapes and dtypes, for `--dry-run` and the writer.

The predicted peak is the sum of what is in memory at the worst moment:

    process       this process as it stands, libraries loaded
    outer         embeddings, final norm, output head
    block         the largest block, twice: as loaded, and as the float32 weight being rounded
    moments       K x K float32 matrices for the widest input: three (Hessian, factor, half of one to invert it), one more
                  where tokens are few for it, five with a transform (two moments, one scaled, and the factor)
    activations   the blocks' inputs and outputs for every calibration token
    suspended     what suspended forwards hold inside the block, where that fits (`llmq.blocks.replay`)
    probe         with a transform: the float64 copy of a block that pairs are found on

If the model generates its own calibration text and that needs more, the peak is: the process, the whole model, the key/value
cache of the windows generated at a time, and their logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from llmq.blocks.replay import elements_per_batch, suspended_limit
from llmq.config import QuantConfig, method
from llmq.formats.base import TensorSpec
from llmq.memory import peak_rss_bytes
from llmq.quantization.holdout import is_undersampled
from llmq.quantization.plan import Plan, Planned


class StoredTensor(Protocol):
    """One tensor of a source: its name in the files, the parameter that it is (None for a computed one), and its spec."""

    @property
    def name(self) -> str: ...

    @property
    def parameter(self) -> str | None: ...

    @property
    def spec(self) -> TensorSpec: ...


class Sized(Protocol):
    """The part of a source (`llmq.hf.source_base.Source`) that sizes are computed from."""

    model: nn.Module
    config: Any
    dtype: torch.dtype

    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def tensor_plan(self) -> Sequence[StoredTensor]: ...


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
    """The prediction for a run.

    Fields:
        rows: every tensor.
        memory: predicted peak bytes by part (see the module).
        notes: what differs from the request.
    """

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
    for stored in source.tensor_plan():
        specs.update(_becomes(stored, plan))
    return specs


def _planned(parameter: str | None, plan: Plan) -> Planned | None:
    """The plan of the linear whose weight `parameter` is; None for any other tensor."""
    if parameter is None or not parameter.endswith(".weight"):
        return None
    return plan.linears.get(parameter.removesuffix(".weight"))


def _becomes(stored: StoredTensor, plan: Plan) -> Mapping[str, TensorSpec]:
    """What is written for a tensor of the source."""
    planned = _planned(stored.parameter, plan)
    if planned is None:
        return {stored.name: stored.spec}
    local = plan.format.specs(planned.shape, planned.scheme)
    return {f"{stored.name.removesuffix('weight')}{suffix}": spec for suffix, spec in local.items()}


def make_preview(source: Sized, plan: Plan, config: QuantConfig, windows: int, length: int) -> Preview:
    """The preview of a run over `windows` calibration windows of `length` tokens."""
    rows = []
    for tensor in source.tensor_plan():
        planned, written = _planned(tensor.parameter, plan), _becomes(tensor, plan)
        becomes = str(tensor.spec.dtype).removeprefix("torch.")
        if planned is not None:
            grid = planned.scheme.weight
            becomes = f"int{grid.bits} " + (f"g{grid.group_size}" if grid.group_size else "channel")
        after = sum(spec.nbytes for spec in written.values())
        rows.append(PreviewRow(tensor.name, tensor.spec.shape, tensor.spec.nbytes, after, becomes))
    notes = [f"{row.name}: {row.note}" for row in plan.linears.values() if row.note]
    return Preview(tuple(rows), _memory(source, plan, config, windows, length), (*source.notes, *plan.notes, *notes))


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
    fits = suspended <= suspended_limit(torch.device("cpu"))
    return parts | {
        "moments": matrices * 4 * wide * wide,
        "activations": 2 * windows * length * hidden * size,
        "suspended": suspended if fits else 0,
        "probe": 8 * largest if row.transform else 0,
    }
