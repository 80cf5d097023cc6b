"""Run one decoder block over all calibration batches in stages, so that its weights can be changed between the stages.

A stage stops every batch's forward before one module, hands out the inputs that the observed modules get there, and goes
on once the caller has seen them and changed what it wants to change. Quantizing g groups of linears in execution order,
each on the outputs of already quantized predecessors, then costs one forward of the block, not g + 1.

Two ways to do it, with the same arithmetic and so the same bytes:

    suspended   each forward runs in a greenlet of its own and is suspended in the stop's pre-hook (one thread, nothing is
                concurrent). All batches' activations inside the block are alive meanwhile.
    repeated    the block is run again from its start for each stage, up to the stop.

Suspended is taken where the activations fit into memory, see `fits_suspended`. A forward that has entered a thread-local
mode of torch (autocast, a dispatch mode, ...) when it reaches a stop cannot be suspended: modes must be left in the order
in which they were entered. This is noticed at the stop; that stage and all later ones are then repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call, Stop
from llmq.errors import LlmqError
from llmq.memory import available_bytes

OUT_OF_ORDER = "linears of a decoder block run in a different order from call to call, which is not supported"

Forward = Callable[[], Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """Where forwards stop and what is observed there.

    Fields:
        stop: the module before which every forward stops. It runs once per forward.
        members: the linears that are observed: `stop`, or linears inside it, which may run any number of times on any tokens.
        arguments: changes what `stop` is run with to be observed.
    """

    stop: nn.Module
    members: tuple[nn.Module, ...]
    arguments: Callable[[Arguments], Arguments] | None = None

    @staticmethod
    def at(linear: nn.Module) -> Stage:
        """The stage that observes the input of one linear."""
        return Stage(linear, (linear,))


Inputs = Iterator[tuple[Tensor, ...]]
"""For every batch in turn, the input of each member: as the member gets it, [..., K]. A member that runs several times has
them one after the other, [tokens, K], and one that does not run has [0, K]."""


def replay(block: nn.Module, calls: Sequence[Call], hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The block's output for every batch."""
    return tuple(y for (y,) in _finished(_forwards(block, calls, hidden)))


def staged(
    block: nn.Module,
    calls: Sequence[Call],
    hidden: Sequence[Tensor],
    stages: Sequence[Stage],
    suspend: bool | None = None,
) -> Generator[Inputs, None, None]:
    """Run `block` over all batches: yields one iterator for each stage, over the batches' inputs, then one over the outputs.

        with closing(staged(block, calls, hidden, stages)) as runs:
            for stage, inputs in zip(stages, runs):
                ...  # use `inputs`, then change weights of the stage's members, or of anything that runs later
            outputs = [y for (y,) in next(runs)]

    What is left of an iterator is used up when the next one is asked for. calls, hidden: one per batch; hidden is
    [batch, tokens, width]. stages: in execution order. suspend: True or False forces one of the two ways; None decides by
    the memory that is available. Use `contextlib.closing`, so that an exception leaves neither hooks nor suspended forwards.
    Raises `LlmqError` where forwards reach the stops in another order than that of `stages`.
    """
    if suspend is None:
        suspend = fits_suspended(block, hidden)
    forwards = _forwards(block, calls, hidden)
    done = 0
    if suspend:
        with closing(_suspended(forwards, stages)) as runs:
            for inputs in runs:
                if inputs is None:
                    break
                yield inputs
                done += 1
    if done <= len(stages):
        yield from _repeated(forwards, stages[done:])


def fits_suspended(block: nn.Module, hidden: Sequence[Tensor]) -> bool:
    """Whether the activations of all batches inside `block` fit into `suspended_limit`."""
    return not hidden or suspended_bytes(block, hidden) <= suspended_limit(hidden[0].device)


def suspended_limit(device: torch.device) -> int:
    """Bytes that suspended activations may take: half of the memory available on `device`; 1 GiB where that is unknown."""
    available = available_bytes(device)
    return 1 << 30 if available is None else available // 2


def suspended_bytes(block: nn.Module, hidden: Sequence[Tensor]) -> int:
    """The most that suspended forwards of all batches hold inside `block`: see `elements_per_batch`."""
    return sum(x[..., 0, 0, 0].nbytes * elements_per_batch(block, *x.shape[-3:]) for x in hidden)


def elements_per_batch(block: nn.Module, batch: int, tokens: int, width: int) -> int:
    """Elements that one suspended forward holds at the worst stop: two hidden states, the widest input of a linear, and the
    attention probabilities where the block computes them itself.

    Attention by torch's fused kernels keeps no probabilities. Blocks whose config names no such kernel are taken to
    keep [batch, heads, tokens, tokens] of them.
    """
    widest = max((m.in_features for m in block.modules() if isinstance(m, nn.Linear)), default=0)
    return batch * tokens * (2 * width + widest + _attention_heads(block) * tokens)


def _attention_heads(block: nn.Module) -> int:
    """Heads whose probabilities are kept; 0 with fused attention, and where no module names a number of heads."""
    for module in block.modules():
        config = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", None) or getattr(module, "num_heads", None)
        if isinstance(heads, int):
            return 0 if getattr(config, "_attn_implementation", "eager") not in (None, "eager") else heads
    return 0


def _forwards(block: nn.Module, calls: Sequence[Call], hidden: Sequence[Tensor]) -> list[Forward]:
    return [partial(call, block, x) for call, x in zip(calls, hidden, strict=True)]


@torch.no_grad()
def _suspended(forwards: Sequence[Forward], stages: Sequence[Stage]) -> Generator[Inputs | None, None, None]:
    """The iterators of `staged`, forwards being suspended. None ends it early: the rest must be repeated."""
    from greenlet import getcurrent, greenlet  # here: code that only measures or serves does without it

    caller = getcurrent()
    running = [greenlet(forward) for forward in forwards]
    before = _modes()

    def reached(index: int, arguments: Arguments) -> None:
        caller.switch((index, arguments, _modes() == before))

    try:
        with _hooked([stage.stop for stage in stages], reached) as paused:
            for index, stage in enumerate(stages):
                first = running[0].switch() if running else None
                if first is not None and _is_stop(first, index) and not first[2]:
                    yield None
                    return
                inputs = _inputs_of(stage, index, _resumed(running, first), paused)
                yield inputs
                for _ in inputs:  # forwards that the caller has not asked for must reach the stop, too
                    pass
            yield _outputs_of(running)
    finally:
        for forward in running:  # unwinds what is still suspended, so that its context managers are left
            if forward:
                forward.throw()


def _resumed(running: Sequence[Any], first: Any) -> Iterator[Any]:
    """What each forward gives when it is resumed; the first one has been already."""
    if running:
        yield first
    for forward in running[1:]:
        yield forward.switch()


@torch.no_grad()
def _inputs_of(stage: Stage, index: int, results: Iterator[Any], paused: list[bool]) -> Inputs:
    for result in results:
        if not _is_stop(result, index):
            raise LlmqError(OUT_OF_ORDER)
        if not result[2]:
            raise LlmqError("a decoder block enters a mode of torch for some batches and not for others")
        yield _observed(stage, result[1], paused)


@torch.no_grad()
def _outputs_of(running: Sequence[Any]) -> Inputs:
    for forward in running:
        yield (forward.switch(),)


def _is_stop(result: Any, index: int) -> bool:
    return isinstance(result, tuple) and result[0] == index


def _repeated(forwards: Sequence[Forward], stages: Sequence[Stage]) -> Iterator[Inputs]:
    """The iterators of `staged`, the block being run again from its start for each."""
    for stage in stages:
        inputs = _stopped(forwards, stage)
        yield inputs
        for _ in inputs:
            pass
    yield _finished(forwards)


@torch.no_grad()
def _stopped(forwards: Sequence[Forward], stage: Stage) -> Inputs:
    caught: list[Arguments] = []

    def stop(_: int, arguments: Arguments) -> None:
        caught.append(arguments)
        raise Stop

    for forward in forwards:
        with _hooked([stage.stop], stop) as paused:
            try:
                forward()
            except Stop:
                inputs = _observed(stage, caught.pop(), paused)
            else:
                raise LlmqError(OUT_OF_ORDER)
        yield inputs


@torch.no_grad()
def _finished(forwards: Sequence[Forward]) -> Inputs:
    for forward in forwards:
        yield (forward(),)


def _observed(stage: Stage, arguments: Arguments, paused: list[bool]) -> tuple[Tensor, ...]:
    """The inputs of the stage's members, given the arguments of its stop."""
    args, kwargs = arguments if stage.arguments is None else stage.arguments(arguments)
    if stage.members == (stage.stop,):
        return (args[0] if args else next(iter(kwargs.values())),)
    seen: list[list[Tensor]] = [[] for _ in stage.members]
    handles = [
        member.register_forward_pre_hook(lambda _, inputs, own=own: own.append(inputs[0]))
        for member, own in zip(stage.members, seen, strict=True)
    ]
    paused[0] = True  # the stop runs to be observed; its own hook must not stop it
    try:
        stage.stop(*args, **kwargs)
    finally:
        paused[0] = False
        for handle in handles:
            handle.remove()
    return tuple(_joined(xs, member, args, kwargs) for xs, member in zip(seen, stage.members, strict=True))


def _joined(inputs: Sequence[Tensor], member: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if len(inputs) == 1:
        return inputs[0]
    if inputs:
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return given.new_empty(0, cast(int, member.in_features))


def _modes() -> tuple[object, ...]:
    """The thread-local and global modes of torch that decide what an operator computes."""
    return (
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
    )


@contextmanager
def _hooked(stops: Sequence[nn.Module], reached: Callable[[int, Arguments], object]) -> Iterator[list[bool]]:
    """While open, `reached(index, arguments)` is called before each stop runs, but not while the flag it gives is set."""
    paused = [False]

    def hook(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not paused[0]:
                reached(index, (args, kwargs))

        return before

    handles = [stop.register_forward_pre_hook(hook(index), with_kwargs=True) for index, stop in enumerate(stops)]
    try:
        yield paused
    finally:
        for handle in handles:
            handle.remove()
