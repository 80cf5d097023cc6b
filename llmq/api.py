"""The public verbs that make checkpoints, composed from the layers below: `quantize` and `preview`.

    quantize   source -> plan -> calibration windows -> blocks one at a time -> staged checkpoint -> Report
    preview    the same plan from shapes alone: every tensor before and after, totals, predicted peak memory

Those that serve them are `llmq.hf.quantizer` (load, enable, disable), `llmq.serving.dispatch` (explain, warmup) and
`llmq.hf.generation` (generate_fast).

transformers is imported when a verb is called, never at import.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq._version import __version__
from llmq.blocks.statistics import split_into_lanes
from llmq.calibration import GenerationProgress
from llmq.checkpoint.target import refuse_overlap
from llmq.checkpoint.writer import StagedCheckpoint
from llmq.config import SELF, Calibration, QuantConfig, method
from llmq.errors import LlmqError
from llmq.memory import peak_rss_bytes, trim_heap
from llmq.quantization.block import BlockInputs, BlockResult, BlockState
from llmq.quantization.experts import COUNTED, expert_notes, is_expert
from llmq.quantization.holdout import few_tokens_notes
from llmq.quantization.pipeline import Step, quantize_blocks
from llmq.quantization.plan import Plan, make_plan
from llmq.quantization.rounding import LinearReport, Recipe
from llmq.quantization.sizing import Preview, make_preview, planned_specs, with_writing
from llmq.report import CalibrationUsed, Report, write_report
from llmq.transforms.base import PairReport

if TYPE_CHECKING:
    from llmq.hf.source import Source

TOKENS_PER_BATCH = 4096  # fixed, so that results do not depend on memory


def quantize(
    source: Any,
    output: str | Path,
    config: QuantConfig | None = None,
    calibration: Calibration | Tensor | None = None,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    device: str = "auto",
    revision: str | None = None,
    progress: Callable[[Step | GenerationProgress], None] = lambda step: None,
) -> Report:
    """Quantize a causal LM into a compressed-tensors checkpoint folder.

    source: a folder of safetensors, a hub repo id, a GGUF file, or a loaded transformers model (which is not changed).
    output: the folder to make; it appears complete or not at all.
    calibration: which text (default: the built-in one), or token ids int64 [windows, tokens] used as they are. A method
        without data uses none, and notes it where one is given.
    progress: called with a `Step` as blocks are worked on, and with a `GenerationProgress` while the model generates its
        own calibration text.
    max_shard_size: as in `save_pretrained`. device: `auto` is CUDA where there is one, else the CPU.
    Raises `LlmqError` for every broken rule, before any work where that is possible.

    (Over 50 lines: the order of the steps is the point, and half of them are the docstring and the report.)
    """
    from llmq.hf.forward import find_shared_inputs
    from llmq.hf.source import open_source

    began = time.perf_counter()
    config = config or QuantConfig()
    refuse_overlap(output, _inputs(source, calibration))
    opened = open_source(source, dtype=config.dtype, device=pick_device(device), revision=revision)
    refuse_overlap(output, opened.files)
    plan = make_plan(
        opened.model, config, opened.dtype, partial(find_shared_inputs, opened), stacks=opened.experts.stacks
    )
    specs = planned_specs(opened, plan)
    with StagedCheckpoint(Path(output), specs, max_shard_size, overwrite) as staged:
        # Before hours of work: a config or tokenizer that cannot be saved is found now.
        opened.write_side_files(staged.folder, quantization_config(opened, plan, config))
        windows, used, window_notes = _windows(opened, config, calibration, progress)
        rows, pairs = _run(opened, plan, config, windows, staged, progress)
        report = Report(
            output=str(output),
            source=opened.description,
            config=config,
            dtype=str(opened.dtype).removeprefix("torch."),
            seconds=time.perf_counter() - began,
            peak_rss_bytes=peak_rss_bytes(),
            bits_per_weight=bits_per_weight(plan),
            checkpoint_bytes=sum(spec.nbytes for spec in specs.values()),
            calibration=used,
            fallbacks=tuple(f"{row.name}: {note}" for row in rows for note in row.notes if note not in COUNTED),
            notes=(
                *opened.notes,
                *opened.experts.notes(plan.linears),
                *plan.notes,
                *window_notes,
                *few_tokens_notes((row.shape[1], row.tokens, row.holdout_ratio) for row in rows if not is_expert(row)),
                *expert_notes(rows),
            ),
            versions=_versions(),
            layers=tuple(rows),
            pairs=tuple(pairs),
        )
        write_report(staged.folder, report)
        staged.commit()
    return report


def _inputs(source: Any, calibration: Calibration | Tensor | None) -> Iterator[Path]:
    """The paths that a run reads, as far as they are known before the source is opened; some may not exist."""
    if isinstance(source, (str, Path)):
        yield Path(source).expanduser()
    elif hasattr(source, "folder") and hasattr(source, "file"):
        yield Path(source.folder) / str(source.file)
    elif getattr(source, "name_or_path", ""):
        yield Path(source.name_or_path)
    if isinstance(calibration, Calibration):
        yield Path(calibration.dataset)


def preview(
    source: Any,
    config: QuantConfig | None = None,
    calibration: Calibration | None = None,
    *,
    revision: str | None = None,
) -> Preview:
    """What `quantize` would write and at most need, from names and shapes: nothing is quantized or written.

    Of a folder only headers are read; a repo id is downloaded first, and a GGUF file is read whole.
    """
    from llmq.hf.calibration_data import window_length
    from llmq.hf.forward import find_shared_inputs
    from llmq.hf.self_calibration import ROWS, text_start
    from llmq.hf.source import open_source

    config = config or QuantConfig()
    opened = open_source(source, dtype=config.dtype, device="cpu", revision=revision)
    plan = make_plan(
        opened.model, config, opened.dtype, partial(find_shared_inputs, opened), stacks=opened.experts.stacks
    )
    calibration = calibration or Calibration()
    if not method(config.method).calibrated:
        return make_preview(opened, plan, config, 0, 0)
    length = window_length(opened, calibration)
    made = make_preview(opened, plan, config, calibration.num_samples, length)
    if calibration.dataset != SELF:
        return made
    text_start(opened)  # refused here as it would be
    return with_writing(made, opened, calibration.num_samples, length, ROWS)


def pick_device(device: str) -> str:
    """`auto` -> `cuda` where there is one, else `cpu`; anything else is taken as it is, if torch knows it."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LlmqError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if place.is_meta:
        raise LlmqError("--device meta: nothing is computed there; name a device that holds data")
    return device


def _windows(
    source: Source,
    config: QuantConfig,
    calibration: Calibration | Tensor | None,
    progress: Callable[[Step | GenerationProgress], None],
) -> tuple[Tensor, CalibrationUsed | None, tuple[str, ...]]:
    """Token windows int64 [n, tokens], what they are for the report, and notes.

    A method without data gets a few tokens, by which its blocks are taken apart.
    """
    from llmq.hf.calibration_data import calibration_data
    from llmq.hf.forward import probe_ids

    if not method(config.method).calibrated:
        unused = f"method {config.method} uses no calibration data; what was given is not used"
        return probe_ids(source.model), None, () if calibration is None else (unused,)
    data = calibration_data(source, calibration, progress)
    count, length = data.windows.shape
    return data.windows, CalibrationUsed(data.name, count, length, count * length), data.notes


def _run(
    source: Source,
    plan: Plan,
    config: QuantConfig,
    windows: Tensor,
    staged: StagedCheckpoint,
    progress: Callable[[Step], None],
) -> tuple[list[LinearReport], list[PairReport]]:
    """Capture the blocks' inputs, then quantize block by block and write each one when it is done."""
    from llmq.hf.forward import PROBE_TOKENS, capture_blocks

    source.load_outer()
    for name, tensor in source.outer_tensors():
        staged.write(name, tensor)
    batches, lanes = split_into_lanes(windows, TOKENS_PER_BATCH)
    captured = capture_blocks(source, batches)
    probe = capture_blocks(source, [windows[:1, :PROBE_TOKENS]])
    recipe = Recipe.of(config)
    layers: list[LinearReport] = []
    pairs: list[PairReport] = []
    inputs = [
        BlockInputs(calls, lanes, few[0], probe.hidden[0].shape[-2])
        for calls, few in zip(captured.calls, probe.calls, strict=True)
    ]
    results = quantize_blocks(source, BlockState(captured.hidden), inputs, plan, recipe, progress)
    del captured  # else the first block's hidden states stay in memory
    for result in results:
        _write_block(source, plan, result, staged)
        layers += result.layers
        pairs += result.pairs
        del result
        trim_heap()
    return layers, pairs


def _write_block(source: Source, plan: Plan, result: BlockResult, staged: StagedCheckpoint) -> None:
    stored = {source.checkpoint_name(name): weight for name, weight in result.codes.items()}
    replaced = {name for name, linears in source.experts.replaced.items() if linears[0] in result.codes}
    for name, tensor in source.block_tensors(result.index):
        if name.removesuffix(".weight") not in stored and name not in replaced:
            staged.write(name, tensor)
    for name, weight in stored.items():
        for suffix, tensor in plan.format.encode(weight).items():
            staged.write(f"{name}.{suffix}", tensor)


def quantization_config(source: Source, plan: Plan, config: QuantConfig) -> dict[str, Any]:
    """config.json's `quantization_config`, with what made it as a top-level key that every reader ignores."""
    schemes = {source.checkpoint_name(name): row.scheme for name, row in plan.linears.items()}
    # Both names where they differ: engines match the files' names, transformers the modules'.
    ignored = list(dict.fromkeys(n for name in plan.ignored for n in (source.checkpoint_name(name), name)))
    return plan.format.config(schemes, ignored, method(config.method).ordered) | {
        "llmq": {"version": _versions()["llmq"], **config.to_dict()}
    }


def bits_per_weight(plan: Plan) -> float:
    """Stored bits per weight of the quantized linears, scales and zero points included."""
    stored = weights = 0
    for row in plan.linears.values():
        specs = plan.format.specs(row.shape, row.scheme)
        stored += sum(spec.nbytes for name, spec in specs.items() if name not in plan.format.metadata_names)
        weights += row.shape[0] * row.shape[1]
    return 8 * stored / weights


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"llmq": __version__, **packages, "python": platform.python_version()}
