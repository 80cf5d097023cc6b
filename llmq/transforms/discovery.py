"""A proven pair for each group of linears of a block, or why there is none.

A pair that the previous block had is proven on the block itself, at the cost of two forwards of a few tokens: channels are
scaled by random powers of two, columns by their inverses, and the output must not change by a single bit. A probe is built
(`llmq.transforms.pair_search`) only where that fails, and for a block of another structure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call, all_results
from llmq.blocks.topology import structure
from llmq.transforms.pair_search import holds_on_probe, search_pair
from llmq.transforms.pairs import KnownPairs, NoPair, Pair, scale_consumer, scale_producer
from llmq.transforms.probe import Probe, random_exponents


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
        if isinstance(pair, NoPair):
            proven = digest == known.structure
        else:
            proven = pair is not None and _fits(block, pair) and _holds_in_place(block, call, hidden, pair)
        if proven and pair is not None:
            kept[group] = pair
    if len(kept) < len(groups):
        missing = [group for group in groups if group not in kept]
        try:
            probe = Probe(block, call, hidden)
            kept |= {group: _searched(probe, group, before.get(group)) for group in missing}
        except Exception as error:  # a block's code may raise anything in float64
            cause = (str(error).splitlines() or [""])[0]
            refused = f"the block cannot be run in float64: its code raises {type(error).__name__}: {cause}"
            kept |= {group: NoPair(group, refused) for group in missing}
    return KnownPairs(digest, tuple(kept[group] for group in groups))


def _searched(probe: Probe, group: tuple[str, ...], pair: Pair | NoPair | None) -> Pair | NoPair:
    """`pair` where it holds on `probe` too, else what a search finds."""
    holds = isinstance(pair, Pair) and _fits(probe.block, pair) and holds_on_probe(probe, pair)
    return pair if holds and pair is not None else search_pair(probe, group)


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
        want = all_results(call, call(block, hidden))
        factors = torch.pow(2.0, random_exponents(len(weight), generator).float()).to(weight.device)
        fed = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        fed[channels] = True
        factors = torch.where(fed, factors, 1.0)
        scale_producer(producer, pair, factors)
        for name in pair.consumers:
            consumer = modules[name]
            assert isinstance(consumer, nn.Linear)
            scale_consumer(consumer, 1 / factors[channels])
        found = all_results(call, call(block, hidden))
        return bool(torch.isfinite(want).all()) and torch.equal(found, want)
    finally:
        for name, module in modules.items():
            for parameter, value in zip(module.parameters(), before[name], strict=True):
                parameter.data.copy_(value)
