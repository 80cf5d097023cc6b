"""AWQ: scale up the columns that meet large inputs before rounding, and scale their inputs down where they are produced.

After Lin et al., arXiv 2306.00978, section 3.2: a column whose input is large gets finer steps when it is multiplied by
s > 1 before rounding and its input divided by s. Per pair (`llmq.transforms.pairs`)

    s = mean|x|^a / mean|w|^b          per input channel; the paper's is b = 0, its code's "duo" b = 1 - a

is searched: identity, both families, then the neighbourhood of the best point in the (a, b) plane. A candidate is scored
by the output error of the consumers, tr(E H E^T) with the second moment H of their inputs, E the error of the rounded
scaled weight scaled back, rounded with the scale search that every method shares, so that scales and ranges are fitted
jointly and nothing is clipped twice. Errors are sums over rows: `ROWS` of them, evenly spaced, rank candidates as all do.

Then the rounding that will really follow decides, with and without, on second moments of windows that the search has not
seen; a pair that does not gain there is left as it was. What is folded is rounded first: into the norm (or the rows of
a linear) in its storage dtype, and the columns get the inverse of what the norm really has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmq.blocks.statistics import Observed
from llmq.core.grid import Grid, quantize
from llmq.core.quantized import QuantizedWeight
from llmq.methods.scales import search
from llmq.transforms.base import PairReport, Proposal, Round, Task
from llmq.transforms.pairs import Pair, scale_consumer, scale_producer

ROWS = 128
RATIO_STEP = 3  # while candidates are compared, every third ratio of the scale search is tried
EXPONENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
FINER = tuple((a, b) for a in (-0.1, 0.0, 0.1) for b in (-0.1, 0.0, 0.1) if a or b)
LOSS_OF_PRECISION = 0.01  # of a folded tensor's norm: rounding to bfloat16 loses 0.002


@dataclass(frozen=True, eq=False)
class Scales:
    """factors: float32 [K], what the columns are multiplied by. a, b: the exponents that gave them."""

    factors: Tensor
    a: float = 0.0
    b: float = 0.0

    def __str__(self) -> str:
        return f"|x|^{self.a:.2f} / |w|^{self.b:.2f}"


def awq(block: nn.Module, pair: Pair, observed: Observed, task: Task) -> Proposal:
    """The best scale for `pair` and whether it gains; see the module and `llmq.transforms.base`."""
    consumers = [_Consumer(block.get_submodule(name), task.grids[name]) for name in pair.consumers]
    none = Scales(torch.ones_like(observed.mean))

    def score(scales: Scales) -> float:
        return sum(consumer.error(scales.factors, observed.fit, task.dtype) for consumer in consumers)

    def judge(scales: Scales) -> float:
        fit = observed.fit / (scales.factors * scales.factors.unsqueeze(1))  # of inputs over factors
        return sum(consumer.real_error(scales.factors, fit, observed.held, task.round) for consumer in consumers)

    found = {none: score(none)}
    salience = torch.stack([consumer.mean for consumer in consumers]).mean(0)
    candidates = _Candidates(pair, observed.mean, salience)
    found |= {scales: score(scales) for scales in candidates.coarse()}
    best = min(found, key=lambda scales: found[scales])
    if best is not none:
        found |= {scales: score(scales) for scales in candidates.near(best)}
        best = min(found, key=lambda scales: found[scales])
    fit = found[best] / found[none] if 0 < found[none] < math.inf else 1.0
    if best is none:
        report = PairReport(pair.producer, pair.consumers, str(best), fit, None, "no scale lowers the error")
        return Proposal(report)
    without, with_ = judge(none), judge(best)
    held = with_ / without if without > 0 else 1.0
    note = None if held < 1 else "no gain on held-out windows with the rounding that follows"
    report = PairReport(pair.producer, pair.consumers, str(best), fit, held, note)
    return Proposal(report, None if note else partial(_fold, block, pair, best.factors))


class _Consumer:
    """Some rows of a linear, and what scaling its columns does to its output error."""

    def __init__(self, linear: nn.Module, grid: Grid) -> None:
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().float()
        self.mean, self._grid = weight.abs().mean(0), grid
        count = min(ROWS, len(weight))
        self._weight = weight[torch.arange(count, device=weight.device) * len(weight) // count]
        self._share = len(weight) / count

    def error(self, factors: Tensor, moment: Tensor, dtype: torch.dtype) -> float:
        """tr(E H E^T), estimated from some rows; inf beyond float32. moment: H of the inputs as they are; dtype: of scales."""
        scaled = self._weight * factors
        if not bool(torch.isfinite(scaled).all()):
            return math.inf
        found = search(scaled, self._grid, dtype, moment.diagonal() / factors.square(), RATIO_STEP)
        return self._lost(scaled, quantize(scaled, *found, self._grid), factors, moment)

    def real_error(self, factors: Tensor, fit: Tensor, held: Tensor, round_: Round) -> float:
        """The same judged by `held`, rounded by the method that follows against `fit`, H of the inputs over `factors`."""
        scaled = self._weight * factors
        return self._lost(scaled, round_(scaled, fit, self._grid), factors, held)

    def _lost(self, scaled: Tensor, rounded: QuantizedWeight, factors: Tensor, moment: Tensor) -> float:
        lost = rounded.dequantize(torch.float32).sub_(scaled).div_(factors)
        total = self._share * float((lost @ moment * lost).sum(dtype=torch.float64))
        return total if math.isfinite(total) else math.inf


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
            torch.zeros(count, device=log.device).index_add_(0, self._channels, values)
            for values in (log, torch.ones_like(log))
        )
        log = (total / number.clamp_min(1))[self._channels]
        return Scales((log - (log.max() + log.min()) / 2).exp(), a, b)


def _fold(block: nn.Module, pair: Pair, factors: Tensor) -> str | None:
    """Put 1 / factors into the producer and its inverse, as stored there, into the consumers; or say why not."""
    producer, consumers = block.get_submodule(pair.producer), [block.get_submodule(name) for name in pair.consumers]
    before = [parameter.data.clone() for module in (producer, *consumers) for parameter in module.parameters()]
    inverse = torch.ones(len(_weight(producer)), device=factors.device)
    inverse[pair.channels.to(factors.device)] = 1 / factors
    scaled = []
    if pair.form == "rows":
        scaled.append((producer, scale_producer(producer, pair, inverse)))
    else:  # what a norm is rounded to is made good in the consumers
        had = _channel(producer, pair)
        scale_producer(producer, pair, inverse)
        factors = (had / _channel(producer, pair))[pair.channels.to(factors.device)].nan_to_num(nan=1.0)
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
