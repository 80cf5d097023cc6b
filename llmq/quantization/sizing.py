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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from llmq.blocks.replay import elements_per_batch, suspended_limit
from llmq.blocks.stacks import Stack
from llmq.config import QuantConfig, method
from llmq.formats.base import TensorSpec
from llmq.memory import peak_rss_bytes
from llmq.quantization.experts import MATRICES, MOMENT_BYTES
from llmq.quantization.holdout import is_undersampled
from llmq.quantization.plan import Plan, Planned
from llmq.transforms.probe import BYTES_PER_PARAMETER


class StoredTensor(Protocol):
    """One tensor of a source: its name in the files, the parameter that it is (None for a computed one), and its spec."""

    @property
    def name(self) -> str: ...

    @property
    def parameter(self) -> str | None: ...

    @property
    def spec(self) -> TensorSpec: ...


class ExpertNames(Protocol):
    """Which stored tensors hold experts: stored name -> the linears that are written in its place."""

    @property
    def replaced(self) -> Mapping[str, tuple[str, ...]]: ...

    def notes(self, planned: Collection[str]) -> tuple[str, ...]: ...


class Sized(Protocol):
    """The part of a source (`llmq.hf.source_base.Source`) that sizes are computed from."""

    model: nn.Module
    config: Any
    dtype: torch.dtype

    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def tensor_plan(self) -> Sequence[StoredTensor]: ...

    def checkpoint_name(self, module_name: str) -> str: ...

    @property
    def experts(self) -> ExpertNames: ...


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
        specs.update(_becomes(source, stored, plan))
    return specs


def _planned(source: Sized, stored: StoredTensor, plan: Plan) -> dict[str, Planned]:
    """The planned linears that `stored` holds, by their names in the files: one, or all of a layer's fused experts."""
    linears = source.experts.replaced.get(stored.name, ())
    if not linears and stored.parameter is not None and stored.parameter.endswith(".weight"):
        linears = (stored.parameter.removesuffix(".weight"),)
        return {stored.name.removesuffix(".weight"): plan.linears[name] for name in linears if name in plan.linears}
    return {source.checkpoint_name(name): plan.linears[name] for name in linears if name in plan.linears}


def _becomes(source: Sized, stored: StoredTensor, plan: Plan) -> Mapping[str, TensorSpec]:
    """What is written for a tensor of the source."""
    planned = _planned(source, stored, plan)
    if not planned:
        return {stored.name: stored.spec}
    return {
        f"{name}.{suffix}": spec
        for name, row in planned.items()
        for suffix, spec in plan.format.specs(row.shape, row.scheme).items()
    }


def make_preview(source: Sized, plan: Plan, config: QuantConfig, windows: int, length: int) -> Preview:
    """The preview of a run over `windows` calibration windows of `length` tokens."""
    rows = []
    for tensor in source.tensor_plan():
        planned, written = _planned(source, tensor, plan), _becomes(source, tensor, plan)
        becomes = str(tensor.spec.dtype).removeprefix("torch.")
        if planned:
            grid = next(iter(planned.values())).scheme.weight
            becomes = f"int{grid.bits} " + (f"g{grid.group_size}" if grid.group_size else "channel")
        after = sum(spec.nbytes for spec in written.values())
        rows.append(PreviewRow(tensor.name, tensor.spec.shape, tensor.spec.nbytes, after, becomes))
    notes = [*source.notes, *source.experts.notes(plan.linears), *plan.notes]
    notes += [f"{row.name}: {row.note}" for row in plan.linears.values() if row.note]
    return Preview(tuple(rows), _memory(source, plan, config, windows, length), tuple(notes))


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


def _expert_moments(plan: Plan) -> int:
    """Bytes of second moments that are in memory while the experts of a layer are rounded."""
    stacks = [stack for block in plan.stacks for stack in block]
    each = [MATRICES * 4 * stack.columns**2 for stack in stacks]
    together = (min(size * stack.experts, max(size, MOMENT_BYTES)) for size, stack in zip(each, stacks, strict=True))
    return max(together, default=0) + 2 * max(each, default=0)


def _probe_parameters(block: nn.Module, stacks: Sequence[Stack]) -> int:
    """Parameters of the copy that pairs are found on, in which experts share one expert's."""
    shared = sum((stack.experts - 1) * stack.rows * stack.columns for stack in stacks)
    return sum(p.numel() for p in block.parameters()) - shared


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
        "moments": max(matrices * 4 * wide * wide, _expert_moments(plan)),
        "activations": 2 * windows * length * hidden * size,
        "suspended": suspended if fits else 0,
        "probe": max(map(_probe_parameters, blocks, plan.stacks)) * BYTES_PER_PARAMETER if row.transform else 0,
    }
