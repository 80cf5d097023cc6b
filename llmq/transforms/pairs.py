"""Rescalable pairs: what feeds the inputs of a group of linears channel by channel, so that a scale can move between them.

    producer channel / s  ->  (something that commutes with positive scales)  ->  consumer columns * s

Nothing is looked up by name. A producer is proposed by running a *twin* of the block (a copy in float64, every parameter
drawn anew on a coarse binary grid) and watching what reaches the consumers:

    norm      a module without children whose weight is a vector and whose output is the consumers' input. Doubling the
              weight must double what they read; where it does not, the weight is kept as w in 1 + w: then 2 (1 + w) - 1
              must.
    linear    one that runs earlier, and whose doubled rows double what they read: up -> down through the gate product,
              v -> o through attention, fc1 -> fc2 through ReLU. Of a fused projection only some rows do (the v of
              qkv, the up of gate_up): they are found by doubling ever smaller runs of rows until every column of
              the consumers is accounted for.

Which channel feeds which column is read off by doubling, for each bit of the channel's number, the channels that have it
set (heads that share a value head share its channels). Then each pair is proven: channels are scaled by random powers of
two, columns by their inverses, and the twin's output must not change by a single bit. Powers of two are exact in
floating point, so anything else that reads the producer (a residual, a router, a norm) shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call
from llmq.transforms.probe import Twin

LEAST_RUN = 8  # rows: no attention head is narrower
MOST_RUNS = 1024


@dataclass(frozen=True)
class Pair:
    """producer: a norm or a linear, by its name in the block. form: where its scale goes: `weight` or `one_plus` (1 + w) of
    a norm, `rows` of a linear; a bias follows. channels: int64 [K], the producer's channel that feeds each column of the
    consumers. consumers: the linears that read it, by name.
    """

    producer: str
    form: str
    channels: Tensor
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class NoPair:
    """Why nothing can be rescaled before `consumers`."""

    consumers: tuple[str, ...]
    reason: str


def find_pairs(
    block: nn.Module,
    call: Call,
    hidden: Tensor,
    groups: Sequence[tuple[str, ...]],
    known: Sequence[Pair | NoPair] = (),
) -> list[Pair | NoPair]:
    """A proven pair for each group of linears, or why there is none.

    call, hidden: how the block is called on a few tokens, [1, tokens, width]; values do not matter. groups: linears that
    share their input, in execution order (`llmq.blocks.topology.input_groups`). known: the pairs of another block: one that is
    proven here as well is not looked for again.
    """
    twin = Twin(block, call, hidden)
    before = {pair.consumers: pair for pair in known if isinstance(pair, Pair)}
    return [_known(twin, before.get(group)) or _find(twin, group) for group in groups]


def scale_producer(module: nn.Module, pair: Pair, factors: Tensor) -> Tensor:
    """Multiply the producer's channels by `factors` [channels], in place and in its own dtype; the weight as it was before
    being rounded to that."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    exact = weight.data.to(factors.dtype)
    if pair.form == "rows":
        exact = exact * factors.unsqueeze(1)
    elif pair.form == "one_plus":
        exact = (1 + exact) * factors - 1
    else:
        exact = exact * factors
    weight.data.copy_(exact)
    if isinstance(bias, Tensor):
        bias.data.copy_(bias.data.to(factors.dtype) * factors)
    return exact


def scale_consumer(module: nn.Linear, factors: Tensor) -> Tensor:
    """Multiply the columns of a linear by `factors` [K], in place and in its own dtype; the weight before it was rounded."""
    exact = module.weight.data.to(factors.dtype) * factors
    module.weight.data.copy_(exact)
    return exact


@contextmanager
def _scaled(twin: Twin, pair: Pair, factors: Tensor, columns: Tensor | None = None) -> Iterator[None]:
    """While open: the producer's channels times `factors`, the consumers' columns times `columns`."""
    names = (pair.producer, *(pair.consumers if columns is not None else ()))
    before = {name: {k: p.data.clone() for k, p in twin.modules[name].named_parameters()} for name in names}
    try:
        scale_producer(twin.modules[pair.producer], pair, factors)
        for name in names[1:]:
            assert columns is not None
            scale_consumer(twin.modules[name], columns)
        yield
    finally:
        for name in names:
            for key, parameter in twin.modules[name].named_parameters():
                parameter.data.copy_(before[name][key])


def _known(twin: Twin, pair: Pair | None) -> Pair | None:
    """`pair` where it holds in this block too."""
    if pair is None or not all(name in twin.modules for name in (pair.producer, *pair.consumers)):
        return None
    weight = getattr(twin.modules[pair.producer], "weight", None)
    if weight is None or len(weight) <= int(pair.channels.max()):
        return None
    if twin.modules[pair.consumers[0]].in_features != len(pair.channels):
        return None
    return pair if _holds(twin, pair) else None


def _find(twin: Twin, consumers: tuple[str, ...]) -> Pair | NoPair:
    source = twin.source_of(consumers[0])
    before = twin.read(consumers[0])
    refused = "nothing that can be rescaled produces their input"
    if source is not None and (found := _norm(twin, source, consumers, before)) is not None:
        if isinstance(found, Pair):
            return found if _holds(twin, found) else NoPair(consumers, _shared(source))
        refused = found
    order = list(twin.inputs)
    for producer in reversed(order[: order.index(consumers[0])]):
        channels = _fed_by(twin, producer, consumers, before)
        if channels is not None:
            pair = Pair(producer, "rows", channels, consumers)
            if _holds(twin, pair):
                return pair
            refused = _shared(producer)
    return NoPair(consumers, refused)


def _shared(producer: str) -> str:
    return f"{producer} feeds them and something else too: the block's output changes"


def _norm(twin: Twin, name: str, consumers: tuple[str, ...], before: Tensor) -> Pair | str | None:
    """The pair of a norm, in the form that its weight is kept in; or why it is none. before: what the consumers read."""
    weight = getattr(twin.modules[name], "weight", None)
    if weight is None:
        kept = any(True for _ in twin.modules[name].parameters())
        return f"{name} produces their input: no scale passes through it, and it has no weight" if not kept else None
    width = twin.modules[consumers[0]].in_features
    if weight.ndim != 1 or len(weight) != width:
        return None
    for form in ("weight", "one_plus"):
        pair = Pair(name, form, torch.arange(width), consumers)
        with _scaled(twin, pair, torch.full((width,), 2.0, dtype=torch.float64)):
            if torch.equal(twin.read(consumers[0]), 2 * before):
                return pair
    return f"{name} produces their input, and its weight is no scale of it"


def _holds(twin: Twin, pair: Pair) -> bool:
    """The proof: random powers of two into the producer, their inverses into the consumers, nothing changes."""
    fed = torch.zeros(len(twin.modules[pair.producer].weight), dtype=torch.bool)
    fed[pair.channels] = True
    factors = torch.where(fed, torch.pow(2.0, twin.exponents(len(fed)).double()), 1.0)
    with _scaled(twin, pair, factors, 1 / factors[pair.channels]):
        after = twin.run()
    return bool(torch.isfinite(twin.output).all()) and torch.equal(after, twin.output)


def _fed_by(twin: Twin, producer: str, consumers: tuple[str, ...], before: Tensor) -> Tensor | None:
    """channels [K] where rows of the linear `producer` feed the columns of `consumers` one by one; else None."""
    count, width = twin.modules[producer].out_features, before.shape[1]
    dead = (before == 0).all(0)  # ReLU may silence a column on these few tokens
    rows = torch.ones(count, dtype=torch.bool)
    whole = _doubled(twin, producer, consumers, rows, before)
    if whole is None:
        some = _some_rows(twin, producer, consumers, before) if count > width else None
        if some is None:
            return None
        rows = some
    elif not bool((whole | dead).all()):
        return None
    numbers, channels = torch.arange(count), torch.zeros(width, dtype=torch.int64)
    for bit in range(max(1, (count - 1).bit_length())):
        hit = _doubled(twin, producer, consumers, rows & (numbers >> bit & 1).bool(), before)
        if hit is None:
            return None
        channels += hit.long() << bit
    if bool(dead.any()):
        if count != width or not torch.equal(channels[~dead], numbers[~dead]):
            return None
        channels = numbers
    return channels if bool(rows[channels].all()) else None


def _doubled(twin: Twin, producer: str, consumers: tuple[str, ...], rows: Tensor, before: Tensor) -> Tensor | None:
    """Which columns of the consumers' input double with `rows` of the producer: bool [K]; None where any does else."""
    pair = Pair(producer, "rows", torch.empty(0), consumers)
    with _scaled(twin, pair, torch.where(rows, 2.0, 1.0).double()):
        after = twin.read(consumers[0])
    same, double = (after == before).all(0), (after == 2 * before).all(0)
    return double & ~same if bool((same | double).all()) and bool(torch.isfinite(after).all()) else None


def _some_rows(twin: Twin, producer: str, consumers: tuple[str, ...], before: Tensor) -> Tensor | None:
    """Rows of a fused producer that double columns of the consumers, once all columns are accounted for."""
    count, width = twin.modules[producer].out_features, before.shape[1]
    run = math.gcd(count, width)
    while run >= LEAST_RUN and count // run <= MOST_RUNS:
        rows, covered = torch.zeros(count, dtype=torch.bool), torch.zeros(width, dtype=torch.bool)
        for start in reversed(range(0, count, run)):  # v after q and k, up after gate: mostly found at the end
            part = torch.zeros(count, dtype=torch.bool)
            part[start : start + run] = True
            hit = _doubled(twin, producer, consumers, part, before)
            if hit is not None and bool(hit.any()):
                rows |= part
                covered |= hit
            if bool(covered.all()):
                return rows
        run //= next((prime for prime in (2, 3, 5, 7) if run % prime == 0), run)
    return None
