"""How a command ends: errors and Ctrl-C become one line on stderr and an exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from llmq.errors import LlmqError


@contextmanager
def interruptible(show: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    """Wraps a progress callback: while blocks are rounded, Ctrl-C takes effect at the next call; a second one at once.

    Raised at an arbitrary point, `KeyboardInterrupt` can arrive while native code calls back into Python, which aborts the
    process.
    """
    before = signal.getsignal(signal.SIGINT)
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    def step(value: Any) -> None:
        if signal.getsignal(signal.SIGINT) is not receive:
            signal.signal(signal.SIGINT, receive)
        show(value)
        if received:
            raise KeyboardInterrupt

    try:
        yield step
    finally:
        signal.signal(signal.SIGINT, before)


def run_guarded(run: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Run a command; turn `LlmqError` and Ctrl-C into one line on stderr and an exit status.

    interrupted: the line for Ctrl-C.
    """
    try:
        run()
    except LlmqError as error:
        _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        _fail(interrupted, 130)


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status) from None
