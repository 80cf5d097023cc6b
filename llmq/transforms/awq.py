"""AWQ: scale up the columns that meet large inputs before rounding, and scale their inputs down where they are produced.

After Lin et al., arXiv 2306.00978, section 3.2: a column whose input is large gets finer steps when it is multiplied by
s > 1 before rounding and its input divided by s. Per pair (`llmq.transforms.pairs`)

    s = mean|x|^a / mean|w|^b          per input channel; the paper's is b = 0, its code's "duo" b = 1 - a

is searched: identity, both families, then the neighbourhood of the best point in the (a, b) plane. A candidate is scored
by the output error of the consumers, tr(E H E^T) with the second moment H of their inputs, E the error of the rounded
scaled weight scaled back, rounded with the scale search that every method shares, so that scales and ranges are fitted
jointly and nothing is clipped twice. `SAMPLED_ROWS` rows of each consumer stand for all of them.

Then the rounding that will really follow decides, with and without the scales, on second moments of windows that the search
has not seen. A pair that does not gain there is left as it was. What is folded is rounded first: into the norm (or the
rows of a linear) in its storage dtype, and the columns get the inverse of what the norm then has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmq.blocks.statistics import Statistics
from llmq.core.grid import quantize
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.methods.base import Rounding, Target, sampled_rows
from llmq.methods.scales import search
from llmq.transforms.base import PairReport, Proposal, TransformContext
from llmq.transforms.pairs import Pair, scale_consumer, scale_producer

RATIO_STEP = 3
"""While candidates are compared, every third ratio of the scale search is tried."""
EXPONENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
FINER = tuple((a, b) for a in (-0.1, 0.0, 0.1) for b in (-0.1, 0.0, 0.1) if a or b)
LOSS_OF_PRECISION = 0.01
"""Of a folded tensor's norm, at most. Rounding to bfloat16 loses 0.002."""


@dataclass(frozen=True, eq=False)
class Scales:
    """factors: float32 [K], what the columns are multiplied by. a, b: the exponents that gave them."""

    factors: Tensor
    a: float = 0.0
    b: float = 0.0

    def __str__(self) -> str:
        return f"|x|^{self.a:.2f} / |w|^{self.b:.2f}"


def awq(block: nn.Module, pair: Pair, statistics: Statistics, context: TransformContext) -> Proposal:
    """The best scales for `pair`, and whether they gain.

    statistics: of the windows to choose by, with their mean |x|, and of held-out windows.
    """
    mean, held_out = statistics.mean_abs, statistics.held_out
    assert mean is not None
    linears = {name: block.get_submodule(name) for name in pair.consumers}
    stacks = _stack_rows(linears, context.targets)
    identity = Scales(torch.ones_like(mean))

    def score(scales: Scales) -> float:
        return _error(lambda: sum(stack.search_error(scales.factors, statistics.hessian) for stack in stacks))

    def judge(scales: Scales) -> float:
        assert held_out is not None
        scaled = statistics.hessian / (scales.factors * scales.factors.unsqueeze(1))  # H of the inputs over the factors
        seen = replace(statistics, hessian=scaled)
        rounding = context.rounding
        return _error(lambda: sum(stack.rounded_error(scales.factors, seen, held_out, rounding) for stack in stacks))

    errors = {identity: score(identity)}
    candidates = _Candidates(pair, mean, _mean_abs(list(linears.values())))
    errors |= {scales: score(scales) for scales in candidates.coarse()}
    best = min(errors, key=errors.__getitem__)
    if best is not identity:
        errors |= {scales: score(scales) for scales in candidates.near(best)}
        best = min(errors, key=errors.__getitem__)
    fitted = errors[best] / errors[identity] if 0 < errors[identity] < math.inf else 1.0
    report = PairReport(pair.producer, pair.consumers, str(best), fitted, None, None)
    if best is identity:
        return Proposal(replace(report, note="no scale lowers the error"))
    if held_out is None:
        return Proposal(replace(report, note="no window was held out to judge it by"))
    without, with_ = judge(identity), judge(best)
    gained = with_ / without if 0 < without < math.inf else 1.0
    report = replace(report, held_out_ratio=gained)
    if not gained < 1:
        return Proposal(replace(report, note="no gain on held-out windows with the rounding that follows"))
    return Proposal(report, partial(_fold, block, pair, best.factors))


def _error(measure: Callable[[], float]) -> float:
    """An error; inf where it is not finite, or where weights so scaled cannot be rounded."""
    try:
        error = measure()
    except LlmqError:
        return math.inf
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class _Stack:
    """Rows of consumers that are rounded to one target, one below the other.

    Fields:
        weight: float32 [n, K].
        shares: float32 [n], how many rows of its linear each one stands for.
        target: what they are rounded to.
    """

    weight: Tensor
    shares: Tensor
    target: Target

    def search_error(self, factors: Tensor, moment: Tensor) -> float:
        """tr(E H E^T) with scales searched against the diagonal of H. moment: H of the unscaled inputs, [K, K]."""
        scaled = self.weight * factors
        if not bool(torch.isfinite(scaled).all()):
            return math.inf
        grid, importance = self.target.grid, moment.diagonal() / factors.square()
        scale, zero = search(scaled, grid, self.target.dtype, importance, RATIO_STEP)
        return self._lost(scaled, quantize(scaled, scale, zero, grid), factors, moment)

    def rounded_error(self, factors: Tensor, fitted: Statistics, held_out: Tensor, rounding: Rounding) -> float:
        """tr(E H E^T) with H = `held_out`, the scaled rows being rounded against `fitted`."""
        scaled = self.weight * factors
        return self._lost(scaled, rounding(scaled, fitted, self.target).weight, factors, held_out)

    def _lost(self, scaled: Tensor, rounded: QuantizedWeight, factors: Tensor, moment: Tensor) -> float:
        lost = rounded.dequantize(torch.float32).sub_(scaled).div_(factors)
        return float(((lost @ moment * lost).sum(1) * self.shares).sum(dtype=torch.float64))


def _stack_rows(linears: Mapping[str, nn.Module], targets: Mapping[str, Target]) -> list[_Stack]:
    """Sampled rows of the consumers, stacked by target."""
    stacks = []
    for target in dict.fromkeys(targets[name] for name in linears):
        rows, shares = [], []
        for name, linear in linears.items():
            if targets[name] == target:
                weight = _weight(linear)
                chosen = sampled_rows(len(weight), weight.device)
                rows.append(weight[chosen].float())
                shares.append(torch.full((len(chosen),), len(weight) / len(chosen), device=weight.device))
        stacks.append(_Stack(torch.cat(rows), torch.cat(shares).float(), target))
    return stacks


def _mean_abs(linears: Sequence[nn.Module]) -> Tensor:
    """The mean |w| of each column, [K], over linears that count alike."""
    return torch.stack([_weight(linear).float().abs().mean(0) for linear in linears]).mean(0)


class _Candidates:
    """Scales of one pair from the means |x| [K] and |w| [K] of its channels."""

    def __init__(self, pair: Pair, x: Tensor, w: Tensor) -> None:
        self._channels = pair.channels.to(x.device)
        self._x, self._w = ((v / v.mean().clamp_min(1e-30)).clamp_min(1e-4).log() for v in (x, w))

    def coarse(self) -> Iterator[Scales]:
        for a in EXPONENTS:
            yield self._at(a, 0.0)
            yield self._at(a, 1 - a)

    def near(self, best: Scales) -> Iterator[Scales]:
        for da, db in FINER:
            yield self._at(best.a + da, best.b + db)

    def _at(self, a: float, b: float) -> Scales:
        """Columns that one channel feeds share a scale, the geometric mean of theirs; the middle of all is 1."""
        log = a * self._x - b * self._w
        count = int(self._channels.max()) + 1
        total, number = (
            torch.zeros(count, dtype=log.dtype, device=log.device).index_add_(0, self._channels, values)
            for values in (log, torch.ones_like(log))
        )
        log = (total / number.clamp_min(1))[self._channels]
        return Scales((log - (log.max() + log.min()) / 2).exp(), a, b)


def _fold(block: nn.Module, pair: Pair, factors: Tensor) -> str | None:
    """Put 1 / factors into the producer and its inverse, as stored there, into the consumers; or say why not."""
    producer, consumers = block.get_submodule(pair.producer), [block.get_submodule(name) for name in pair.consumers]
    before = [parameter.data.clone() for module in (producer, *consumers) for parameter in module.parameters()]
    channels = pair.channels.to(factors.device)
    inverse = torch.ones(len(_weight(producer)), dtype=factors.dtype, device=factors.device)
    inverse[channels] = 1 / factors
    scaled = []
    if pair.form == "rows":
        scaled.append((producer, scale_producer(producer, pair, inverse)))
    else:  # what a norm is rounded to is made up for in the consumers
        old = _channel(producer, pair)
        scale_producer(producer, pair, inverse)
        factors = (old / _channel(producer, pair))[channels].nan_to_num(nan=1.0)
    for linear in consumers:
        assert isinstance(linear, nn.Linear)
        scaled.append((linear, scale_consumer(linear, factors)))
    if all(_kept(exact, _weight(module)) for module, exact in scaled) and bool(torch.isfinite(_weight(producer)).all()):
        return None
    for parameter, value in zip((p for m in (producer, *consumers) for p in m.parameters()), before, strict=True):
        parameter.data.copy_(value)
    return f"the scaled weights do not fit {_weight(producer).dtype}"


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.data


def _channel(producer: nn.Module, pair: Pair) -> Tensor:
    """The scale of each channel of a norm, as stored."""
    weight = _weight(producer).float()
    return 1 + weight if pair.form == "one_plus" else weight.clone()


def _kept(exact: Tensor, stored: Tensor) -> bool:
    lost = torch.linalg.vector_norm(stored.float() - exact)
    return bool(torch.isfinite(lost)) and bool(lost <= LOSS_OF_PRECISION * torch.linalg.vector_norm(exact))
