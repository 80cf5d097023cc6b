"""Rescalable pairs: what feeds the inputs of a group of linears channel by channel, so that a scale can move between them.

    producer channel / s  ->  (something that commutes with positive scales)  ->  consumer columns * s

Nothing is looked up by name. Pairs are searched for on a probe of a block (`llmq.transforms.pair_search`) and proven on each
block (`llmq.transforms.discovery`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


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
