"""Rounding the linears that read one input: one stacked weight per target, and what is reported of each linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmq.blocks.statistics import Statistics
from llmq.config import QuantConfig, method, resolve
from llmq.core.grid import clipped_share
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.methods.base import Rounding, Target, output_errors, sampled_rows
from llmq.methods.rtn import rtn
from llmq.quantization.holdout import holdout_ratio, without_held_out
from llmq.quantization.plan import Planned
from llmq.transforms.base import Transform


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear.

    Fields:
        name: the module's full name.
        shape: (out_features, in_features).
        bits: of the codes.
        group_size: columns per scale; None for one scale per output channel.
        error: ||(W - Q) X||^2 / ||W X||^2 on the calibration inputs, from at most 128 rows; of the weights alone for a
            method without data.
        rtn_error: the same of plain round-to-nearest with min-max scales.
        saturated: share of codes at either end of the range.
        clipped: share of weights outside the range.
        tokens: in the Hessian.
        seconds: to observe the input and to round, shared among the linears of one input.
        notes: everything unusual.
        holdout_ratio: held-out error over fitted error, where tokens are few (`llmq.quantization.holdout`); else None.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    error: float
    rtn_error: float
    saturated: float
    clipped: float
    tokens: int
    seconds: float
    notes: tuple[str, ...]
    holdout_ratio: float | None = None


@dataclass(frozen=True)
class Recipe:
    """How weights are rounded: a `QuantConfig` with its names resolved.

    Fields:
        transform: applied to each block first; None for none.
        rounding: of each weight.
        calibrated: whether statistics of inputs are needed.
        scales: `minmax` or `search`.
        damping: share of the mean diagonal added to a Hessian's diagonal.
        all_experts: whether statistics of experts are of all tokens, not of those sent to them.
    """

    transform: Transform | None
    rounding: Rounding
    calibrated: bool
    scales: str
    damping: float
    all_experts: bool = False

    @staticmethod
    def of(config: QuantConfig) -> Recipe:
        """The recipe of a configuration."""
        row = method(config.method)
        return Recipe(
            transform=None if row.transform is None else resolve(row.transform),
            rounding=resolve(row.rounding),
            calibrated=row.calibrated,
            scales=config.scales or row.default_scales,
            damping=config.damping,
            all_experts=config.all_experts,
        )

    def target(self, planned: Planned) -> Target:
        """What a linear is rounded to."""
        return Target(planned.scheme.weight, planned.scheme.scale_dtype, self.scales, self.damping)


def round_group(
    block: nn.Module, name: str, group: Sequence[Planned], statistics: Statistics | None, recipe: Recipe
) -> list[tuple[QuantizedWeight, LinearReport]]:
    """Round the linears of one input group, one stacked weight per target, and write them back.

    Uses up `statistics`.
    """
    modules = {row.name: block.get_submodule(row.name.removeprefix(f"{name}.")) for row in group}
    made: dict[str, tuple[QuantizedWeight, LinearReport]] = {}
    samples: dict[str, tuple[Tensor, Target]] = {}
    for target in dict.fromkeys(recipe.target(row) for row in group):
        rows = [row for row in group if recipe.target(row) == target]
        weight = torch.cat([_weight_of(modules[row.name]).float() for row in rows])  # [N of all, K]
        try:
            rounded = recipe.rounding(weight, statistics, target)
        except LlmqError as error:
            raise LlmqError(f"{rows[0].name}: {error}") from error
        start = 0
        for row in rows:
            stop = start + row.shape[0]
            mine, quantized = weight[start:stop], rounded.weight.rows(start, stop)
            report = _report_of(row, mine, quantized, statistics, target)
            made[row.name] = quantized, replace(report, notes=(*report.notes, *rounded.notes))
            samples[row.name] = mine[sampled_rows(len(mine), mine.device)], target
            _weight_of(modules[row.name]).copy_(quantized.dequantize(_weight_of(modules[row.name]).dtype))
            start = stop
    if statistics is not None and (fitted := without_held_out(statistics)) is not None:
        for linear, (sample, target) in samples.items():
            quantized, report = made[linear]
            made[linear] = quantized, _with_holdout_ratio(report, sample, fitted, target, recipe.rounding)
    return [made[row.name] for row in group]


def _report_of(
    planned: Planned, weight: Tensor, quantized: QuantizedWeight, statistics: Statistics | None, target: Target
) -> LinearReport:
    chosen = sampled_rows(len(weight), weight.device)
    sample = weight[chosen]
    plain = rtn(sample, None, replace(target, scales="minmax")).weight
    hessian = None if statistics is None else statistics.hessian
    error, rtn_error = output_errors(sample, (quantized.select(chosen), plain), hessian)
    return LinearReport(
        name=planned.name,
        shape=planned.shape,
        bits=quantized.bits,
        group_size=planned.scheme.weight.group_size,
        error=error,
        rtn_error=rtn_error,
        saturated=_saturated_share(quantized),
        clipped=clipped_share(weight, quantized),
        tokens=0 if statistics is None else statistics.tokens,
        seconds=0.0,
        notes=() if planned.note is None else (planned.note,),
    )


def _with_holdout_ratio(
    report: LinearReport, sample: Tensor, fitted: Statistics, target: Target, rounding: Rounding
) -> LinearReport:
    try:
        return replace(report, holdout_ratio=holdout_ratio(sample, fitted, target, rounding))
    except LlmqError as error:  # fewer windows may be too few to round for; the real rounding had all of them
        return replace(report, notes=(*report.notes, f"its held-out error cannot be measured: {error}"))


def _saturated_share(quantized: QuantizedWeight) -> float:
    ends = (quantized.codes == 0) | (quantized.codes == (1 << quantized.bits) - 1)
    return float(ends.float().mean())


def _weight_of(linear: nn.Module) -> Tensor:
    assert isinstance(linear, nn.Linear)
    return linear.weight.data
