"""Rescalable pairs: what feeds the inputs of a group of linears channel by channel, so that a scale can move between them.

    producer channel / s  ->  (something that commutes with positive scales)  ->  consumer columns * s

Nothing is looked up by name. A producer is proposed by running a *probe* of the block (`llmq.transforms.probe`: a copy in
float64 with parameters drawn anew on a coarse binary grid) and watching what reaches the consumers:

    norm      a module without children whose weight is a vector and whose output is the consumers' input. Doubling the
              weight must double what they read; where it does not, the weight is kept as w in 1 + w: then 2 (1 + w) - 1
              must.
    linear    one that runs earlier, and whose doubled rows double what they read: up -> down through the gate product,
              v -> o through attention, fc1 -> fc2 through ReLU. Of a fused projection only some rows do (the v of
              qkv, the up of gate_up): they are found by doubling ever smaller runs of rows until every column of
              the consumers is accounted for.

Which channel feeds which column is read off by doubling, for each bit of the channel's number, the channels that have it
set (heads that share a value head share its channels). Then each pair is proven: channels are scaled by random powers of
two, columns by their inverses, and the probe's output must not change by a single bit. Powers of two are exact in
floating point, so anything else that reads the producer (a residual, a router, a norm) shows.

A pair that the previous block had is proven in the same way on the block itself (`_holds_in_place`), at the cost of two
forwards of a few tokens. A probe is built only where that fails, or for a block of another structure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call
from llmq.blocks.topology import structure
from llmq.transforms.probe import Probe, random_exponents

LEAST_RUN = 8  # rows: no attention head is narrower
MOST_RUNS = 1024


@dataclass(frozen=True)
class Pair:
    """A producer and the linears that a scale can be moved into.

    Fields:
        producer: a norm or a linear, by its name in the block.
        form: where its scale goes: `weight` or `one_plus` (1 + w) of a norm, `rows` of a linear; a bias follows.
        channels: int64 [K], the producer's channel that feeds each column of the consumers.
        consumers: the linears that read it, by name.
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


@dataclass(frozen=True)
class KnownPairs:
    """The pairs of one block, and a digest of its structure (`structure_digest`)."""

    structure: str = ""
    pairs: tuple[Pair | NoPair, ...] = ()


def structure_digest(block: nn.Module, call: Call) -> str:
    """Equal for blocks that are built alike and called alike."""
    arguments = [(key, type(value).__name__) for key, value in sorted(call.kwargs.items())]
    return hashlib.sha256(repr((structure(block), arguments)).encode()).hexdigest()


def find_pairs(
    block: nn.Module,
    call: Call,
    hidden: Tensor,
    groups: Sequence[tuple[str, ...]],
    known: KnownPairs | None = None,
) -> KnownPairs:
    """A proven pair for each group of linears, or why there is none.

    call, hidden: how the block is called on a few tokens, [1, tokens, width], on the block's device and in its dtype.
    groups: linears that share their input, in execution order (`llmq.blocks.topology.input_groups`). known: the pairs of
    another block; one that is proven here as well is not searched for again.
    """
    digest = structure_digest(block, call)
    known = known or KnownPairs()
    before = {pair.consumers: pair for pair in known.pairs}
    kept: dict[tuple[str, ...], Pair | NoPair] = {}
    for group in groups:
        pair = before.get(group)
        if (isinstance(pair, NoPair) and digest == known.structure) or (
            isinstance(pair, Pair) and _fits(block, pair) and _holds_in_place(block, call, hidden, pair)
        ):
            kept[group] = pair
    if len(kept) < len(groups):
        probe = Probe(block, call, hidden)
        for group in groups:
            if group not in kept:
                kept[group] = _known(probe, before.get(group)) or _find(probe, group)
    return KnownPairs(digest, tuple(kept[group] for group in groups))


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


def _fits(block: nn.Module, pair: Pair) -> bool:
    """Whether the modules that `pair` names are there, with as many channels and columns."""
    modules = dict(block.named_modules())
    if not all(name in modules for name in (pair.producer, *pair.consumers)):
        return False
    weight = getattr(modules[pair.producer], "weight", None)
    if not isinstance(weight, Tensor) or len(weight) <= int(pair.channels.max()):
        return False
    return all(modules[name].in_features == len(pair.channels) for name in pair.consumers)


@torch.no_grad()
def _holds_in_place(block: nn.Module, call: Call, hidden: Tensor, pair: Pair) -> bool:
    """The proof on the block itself, whose parameters are as before afterwards.

    Weights stay as they are, since their products with powers of two are exact; where one is not (a denormal number in
    float16), the outputs differ and nothing is proven. The weight of a norm that adds one is set to 1 + w = 0.5, 1 or 2
    meanwhile, which stays exact.
    """
    modules = {name: block.get_submodule(name) for name in (pair.producer, *pair.consumers)}
    before = {name: [p.data.clone() for p in module.parameters()] for name, module in modules.items()}
    generator = torch.Generator().manual_seed(0)
    producer = modules[pair.producer]
    weight = producer.weight
    assert isinstance(weight, Tensor)
    channels = pair.channels.to(weight.device)
    try:
        if pair.form == "one_plus":
            drawn = torch.randint(-1, 2, weight.shape, generator=generator)
            weight.data.copy_(torch.pow(2.0, drawn.float()) - 1)
        want = call(block, hidden)
        factors = torch.pow(2.0, random_exponents(len(weight), generator).float()).to(weight.device)
        fed = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        fed[channels] = True
        factors = torch.where(fed, factors, 1.0)
        scale_producer(producer, pair, factors)
        for name in pair.consumers:
            consumer = modules[name]
            assert isinstance(consumer, nn.Linear)
            scale_consumer(consumer, 1 / factors[channels])
        found = call(block, hidden)
        return bool(torch.isfinite(want).all()) and torch.equal(found, want)
    finally:
        for name, module in modules.items():
            for parameter, value in zip(module.parameters(), before[name], strict=True):
                parameter.data.copy_(value)


def _known(probe: Probe, pair: Pair | NoPair | None) -> Pair | None:
    """`pair` where it holds in the probe."""
    return pair if isinstance(pair, Pair) and _fits(probe.block, pair) and _holds(probe, pair) else None


def _find(probe: Probe, consumers: tuple[str, ...]) -> Pair | NoPair:
    source = probe.source_of(consumers[0])
    before = probe.read(consumers[0])
    refused = "nothing that can be rescaled produces their input"
    if source is not None and (found := _norm(probe, source, consumers, before)) is not None:
        if isinstance(found, Pair):
            return found if _holds(probe, found) else NoPair(consumers, _shared(source))
        refused = found
    order = list(probe.inputs)
    for producer in reversed(order[: order.index(consumers[0])]):
        channels = _fed_by(probe, producer, consumers, before)
        if channels is not None:
            pair = Pair(producer, "rows", channels, consumers)
            if _holds(probe, pair):
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


def _holds(probe: Probe, pair: Pair) -> bool:
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
