"""Find the decoder blocks of a model, and capture how the model calls each of them.

    find_decoder  finds the part of a model that maps token ids to hidden states
    find_blocks   finds the list of modules that holds the decoder's layers
    capture       runs the model once over *stub* blocks, which record the arguments of each block and pass the hidden states
                  on. Blocks of different layer types get different masks and rotary tables, so the arguments of every block
                  are kept. The weights of the blocks are not needed.

Arguments are replayed as the model gave them, without caches; none is rebuilt by hand. Whether a block returns a tensor or a
tuple that starts with it is found by trying and then checked: each block must receive the very tensor that the previous
one returned. A model that changes the hidden states between its blocks is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError


class Stop(BaseException):
    """Ends a forward whose remainder is not needed. Not an `Exception`, so that no model code swallows it."""


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """While open, whatever a model's own code raises becomes an `LlmqError` that begins with `what` and states the cause."""
    try:
        yield
    except LlmqError:
        raise
    except Exception as error:  # a model's code may raise anything
        cause = (str(error).splitlines() or [""])[0]
        raise LlmqError(
            f"{what}: its code raises {type(error).__name__}: {cause}; models whose blocks depend on more than the "
            "arguments of each call are not supported"
        ) from error


@dataclass(frozen=True)
class Call:
    """How the model calls one block for one batch.

    Fields:
        place: where the hidden states go: a position or a keyword.
        args: the positional arguments, with None in the place of the hidden states.
        kwargs: the keyword arguments, without the hidden states.
    """

    place: int | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The output of `block` for `hidden`, both [batch, tokens, width]."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = hidden
        else:
            kwargs[self.place] = hidden
        result = block(*args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]


def all_results(call: Call, output: Tensor) -> Tensor:
    """All that a block computed in `call`, in one vector: `output`, and the tensors that it left in the mappings among its
    arguments, where later blocks read them (layers that share keys and values). A copy."""
    given = (*call.args, *call.kwargs.values())
    states = [value for value in given if isinstance(value, MutableMapping)]
    left = [tensor for state in states for value in state.values() for tensor in _tensors(value)]
    return torch.cat([x.flatten() for x in (output, *left)])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True)
class Captured:
    """What the decoder blocks of a model are given.

    Fields:
        hidden: the first block's input for each batch, [batch, tokens, width].
        calls: for each block, how it is called for each batch.
    """

    hidden: tuple[Tensor, ...]
    calls: tuple[tuple[Call, ...], ...]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The dotted name of the list of decoder blocks, and the list: the decoder's outermost `ModuleList` with the most parameters.

    Raises `LlmqError` for a model without one.
    """
    found: dict[str, nn.ModuleList] = {}
    decoder, inside = find_decoder(model)
    for name, module in inside.named_modules(prefix=decoder):
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            found[name] = module
    if not found:
        raise LlmqError(
            f"{type(model).__name__} holds no list of decoder blocks: only decoder-only models are quantized"
        )
    return max(found.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def find_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """The dotted name of the innermost module that holds the embedding of tokens and a `ModuleList`, and the module.

    In a wrapper around a language model the vision tower may be the larger part; this is the language model. A model that
    does not tell its embedding is returned as it is, under the empty name.
    """
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return "", model
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    while name:
        name = name.rpartition(".")[0]
        decoder = model.get_submodule(name)
        if any(isinstance(module, nn.ModuleList) and len(module) for module in decoder.modules()):
            return name, decoder
    return "", model


LENGTHS = (0, 2, 3, 1)
"""Of the tuples that blocks may return, in the order in which they are tried; 0 for the hidden states alone."""


class _Stub(nn.Module):
    """Replaces a block: records the arguments and returns the hidden states as a new tensor.

    Attributes that the model reads from a block, such as its layer type, are those of the block itself.
    """

    def __init__(self, block: nn.Module, length: int, previous: _Stub | None, last: bool) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is not registered as a child
        self._length, self._previous, self._last = length, [previous], last
        self.passed: Tensor | None = None
        self.recorded: tuple[Tensor, Call] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, _Beside) for value in (*args, *kwargs.values())):
            raise _NotPassedOn(
                "a block is given what the block before it returned beside the hidden states, which is not supported"
            )
        previous = self._previous[0]
        place = _place(args, kwargs, None if previous is None else previous.passed)
        hidden = args[place] if isinstance(place, int) else kwargs[place]
        stripped = tuple(None if index == place else value for index, value in enumerate(args))
        rest = {key: _without_cache(value) for key, value in kwargs.items() if key != place}
        self.recorded = hidden, Call(place, stripped, rest)
        self.passed = hidden.view_as(hidden)
        if self._last:
            raise Stop
        return (self.passed, *(_Beside() for _ in range(self._length - 1))) if self._length else self.passed


class _NotPassedOn(LlmqError):
    pass


class _Beside:
    """Stands for what a block returns beside the hidden states: attention weights or states, which nobody may use."""


def _place(args: tuple[Any, ...], kwargs: dict[str, Any], expected: Tensor | None) -> int | str:
    """Where the hidden states are: the argument that is `expected`; for the first block, the first floating tensor."""
    candidates: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in candidates:
        if value is expected if expected is not None else isinstance(value, Tensor) and value.is_floating_point():
            return place
    raise _NotPassedOn(
        "a block does not receive the very hidden states that the block before it returned: "
        "the model changes them in between, which is not supported"
    )


def _without_cache(value: Any) -> Any:
    """A key/value cache is state between calls; a replayed block must not see one."""
    return None if hasattr(value, "get_seq_length") else value


def capture(model: nn.Module, run: Callable[[Tensor], object], batches: Sequence[Tensor]) -> Captured:
    """Record how `model` calls each of its blocks for every batch of token ids.

    run: runs the model's forward on token ids [batch, tokens] without caches. The blocks themselves are not run.
    Arguments equal to those of the first batch are stored once. Raises `LlmqError` for a model that changes the hidden
    states between its blocks, or does not run all of them in order.
    """
    _, blocks = find_blocks(model)
    originals = list(blocks)
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in originals]
    try:
        lengths = list(LENGTHS)
        for batch in batches:
            stubs = _run_stubs(blocks, originals, lengths, run, batch)
            first = stubs[0].recorded
            assert first is not None
            hidden.append(first[0].detach())
            for index, stub in enumerate(stubs):
                assert stub.recorded is not None
                call = stub.recorded[1]
                calls[index].append(_shared(call, calls[index][0]) if calls[index] else call)
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    return Captured(tuple(hidden), tuple(tuple(found) for found in calls))


def _run_stubs(
    blocks: nn.ModuleList,
    originals: list[nn.Module],
    lengths: list[int],
    run: Callable[[Tensor], object],
    batch: Tensor,
) -> list[_Stub]:
    """The stubs after a forward of `batch`. lengths: what to try that blocks return; those that fail are taken out."""
    while True:
        try:
            return _run_once(blocks, originals, lengths[0], run, batch)
        except (_NotPassedOn, IndexError, ValueError, TypeError, RuntimeError):
            if len(lengths) == 1:
                raise
            del lengths[0]


def _run_once(
    blocks: nn.ModuleList, originals: list[nn.Module], length: int, run: Callable[[Tensor], object], batch: Tensor
) -> list[_Stub]:
    stubs: list[_Stub] = []
    for index, block in enumerate(originals):
        stubs.append(_Stub(block, length, stubs[-1] if stubs else None, index == len(originals) - 1))
        blocks[index] = stubs[-1]
    try:
        with torch.no_grad():
            run(batch)
    except Stop:
        pass
    if any(stub.recorded is None for stub in stubs):
        raise _NotPassedOn("the model does not run all of its blocks in order, which is not supported")
    return stubs


def _shared(call: Call, first: Call) -> Call:
    """`call` with every tensor that equals its counterpart in `first` replaced by it."""
    args = tuple(_same(a, b) for a, b in zip(call.args, first.args, strict=True))
    return Call(call.place, args, {key: _same(value, first.kwargs.get(key)) for key, value in call.kwargs.items()})


def _same(value: Any, first: Any) -> Any:
    if isinstance(value, Tensor):
        alike = isinstance(first, Tensor) and value.shape == first.shape and value.dtype == first.dtype
        return first if alike and torch.equal(value, first) else value
    if type(value) is tuple and type(first) is tuple and len(value) == len(first):
        return tuple(_same(a, b) for a, b in zip(value, first, strict=True))
    return value
