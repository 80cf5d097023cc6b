"""Searching for a pair on a probe of a block, and proving it there. See `llmq.transforms.pairs` for what a pair is.

A producer is proposed by watching what reaches the consumers of the probe (`llmq.transforms.probe`: a copy in float64 with
parameters drawn anew on a coarse binary grid):

    norm      a module without children whose weight is a vector and whose output is the consumers' input. Doubling the
              weight must double what they read; where it does not, the weight is kept as w in 1 + w: then 2 (1 + w) - 1
              must.
    linear    one that runs earlier, and whose doubled rows double what they read: up -> down through the gate product,
              v -> o through attention, fc1 -> fc2 through ReLU. Of a fused projection only some rows do (the v of
              qkv, the up of gate_up): they are found by doubling ever smaller runs of rows until every column of
              the consumers is accounted for.

Which channel feeds which column is read off by doubling, for each bit of the channel's number, the channels that have it
set (heads that share a value head share its channels). Then the pair is proven: channels are scaled by random powers of
two, columns by their inverses, and the probe's output must not change by a single bit. Powers of two are exact in
floating point, so anything else that reads the producer (a residual, a router, a norm) shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llmq.transforms.pairs import NoPair, Pair, scale_consumer, scale_producer
from llmq.transforms.probe import Probe

LEAST_RUN = 8  # rows: no attention head is narrower
MOST_RUNS = 1024


def search_pair(probe: Probe, consumers: tuple[str, ...]) -> Pair | NoPair:
    """The pair of `consumers`, linears that read one input, found and proven on `probe`; or why there is none."""
    source = probe.source_of(consumers[0])
    before = probe.read(consumers[0])
    refused = "nothing that can be rescaled produces their input"
    if source is not None and (found := _norm(probe, source, consumers, before)) is not None:
        if isinstance(found, Pair):
            return found if holds_on_probe(probe, found) else NoPair(consumers, _shared(source))
        refused = found
    order = list(probe.inputs)
    for producer in reversed(order[: order.index(consumers[0])]):
        channels = _fed_by(probe, producer, consumers, before)
        if channels is not None:
            pair = Pair(producer, "rows", channels, consumers)
            if holds_on_probe(probe, pair):
                return pair
            refused = _shared(producer)
    return NoPair(consumers, refused)


def _shared(producer: str) -> str:
    return f"{producer} feeds them and something else too: the block's output changes"


def _norm(probe: Probe, name: str, consumers: tuple[str, ...], before: Tensor) -> Pair | str | None:
    """The pair of a norm, in the form that its weight is kept in; or why it is none. before: what the consumers read."""
    weight = getattr(probe.modules[name], "weight", None)
    if weight is None:
        kept = any(True for _ in probe.modules[name].parameters())
        return f"{name} produces their input: no scale passes through it, and it has no weight" if not kept else None
    width = probe.modules[consumers[0]].in_features
    if weight.ndim != 1 or len(weight) != width:
        return None
    for form in ("weight", "one_plus"):
        pair = Pair(name, form, torch.arange(width), consumers)
        with _scaled(probe, pair, torch.full((width,), 2.0, dtype=torch.float64)):
            if torch.equal(probe.read(consumers[0]), 2 * before):
                return pair
    return f"{name} produces their input, and its weight is no scale of it"


def holds_on_probe(probe: Probe, pair: Pair) -> bool:
    """The proof: random powers of two into the producer, their inverses into the consumers, nothing changes."""
    fed = torch.zeros(len(probe.modules[pair.producer].weight), dtype=torch.bool)
    fed[pair.channels] = True
    factors = torch.where(fed, torch.pow(2.0, probe.exponents(len(fed)).double()), 1.0)
    with _scaled(probe, pair, factors, 1 / factors[pair.channels]):
        after = probe.run()
    return bool(torch.isfinite(probe.output).all()) and torch.equal(after, probe.output)


def _fed_by(probe: Probe, producer: str, consumers: tuple[str, ...], before: Tensor) -> Tensor | None:
    """channels [K] where rows of the linear `producer` feed the columns of `consumers` one by one; else None."""
    count, width = probe.modules[producer].out_features, before.shape[1]
    dead = (before == 0).all(0)  # ReLU may silence a column on these few tokens
    rows = torch.ones(count, dtype=torch.bool)
    whole = _doubled(probe, producer, consumers, rows, before)
    if whole is None:
        some = _some_rows(probe, producer, consumers, before) if count > width else None
        if some is None:
            return None
        rows = some
    elif not bool((whole | dead).all()):
        return None
    numbers, channels = torch.arange(count), torch.zeros(width, dtype=torch.int64)
    for bit in range(max(1, (count - 1).bit_length())):
        hit = _doubled(probe, producer, consumers, rows & (numbers >> bit & 1).bool(), before)
        if hit is None:
            return None
        channels += hit.long() << bit
    if bool(dead.any()):
        if count != width or not torch.equal(channels[~dead], numbers[~dead]):
            return None
        channels = numbers
    return channels if bool(rows[channels].all()) else None


def _doubled(probe: Probe, producer: str, consumers: tuple[str, ...], rows: Tensor, before: Tensor) -> Tensor | None:
    """Which columns of the consumers' input double with `rows` of the producer: bool [K]; None where any does else."""
    pair = Pair(producer, "rows", torch.empty(0), consumers)
    with _scaled(probe, pair, torch.where(rows, 2.0, 1.0).double()):
        after = probe.read(consumers[0])
    same, double = (after == before).all(0), (after == 2 * before).all(0)
    return double & ~same if bool((same | double).all()) and bool(torch.isfinite(after).all()) else None


def _some_rows(probe: Probe, producer: str, consumers: tuple[str, ...], before: Tensor) -> Tensor | None:
    """Rows of a fused producer that double columns of the consumers, once all columns are accounted for."""
    count, width = probe.modules[producer].out_features, before.shape[1]
    run = math.gcd(count, width)
    while run >= LEAST_RUN and count // run <= MOST_RUNS:
        rows, covered = torch.zeros(count, dtype=torch.bool), torch.zeros(width, dtype=torch.bool)
        for start in reversed(range(0, count, run)):  # v after q and k, up after gate: mostly found at the end
            part = torch.zeros(count, dtype=torch.bool)
            part[start : start + run] = True
            hit = _doubled(probe, producer, consumers, part, before)
            if hit is not None and bool(hit.any()):
                rows |= part
                covered |= hit
            if bool(covered.all()):
                return rows
        run //= next((prime for prime in (2, 3, 5, 7) if run % prime == 0), run)
    return None


@contextmanager
def _scaled(probe: Probe, pair: Pair, factors: Tensor, columns: Tensor | None = None) -> Iterator[None]:
    """While open: the producer's channels times `factors`, the consumers' columns times `columns`."""
    names = (pair.producer, *(pair.consumers if columns is not None else ()))
    before = {name: {k: p.data.clone() for k, p in probe.modules[name].named_parameters()} for name in names}
    try:
        scale_producer(probe.modules[pair.producer], pair, factors)
        for name in names[1:]:
            assert columns is not None
            scale_consumer(probe.modules[name], columns)
        yield
    finally:
        for name in names:
            for key, parameter in probe.modules[name].named_parameters():
                parameter.data.copy_(before[name][key])
