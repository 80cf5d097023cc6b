"""Command-line options that the kernel scripts share, and the parsers of comma-separated lists."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq.errors import LlmqError

DTYPES = ("float16", "bfloat16")

Shapes = Annotated[str | None, typer.Option(help="KxN, separated by commas; default: those of the script.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the inputs; default: a new one each time.")]
SelfTest = Annotated[bool, typer.Option("--self-test", help="Tiny shapes on the CPU in Triton's interpreter.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder of the JSON file; default: the script's own, a new one in a self-test.")
]


def run(command: Callable[..., int]) -> None:
    """Run a command as a script. Its result is the exit status; an `LlmqError` prints its message and exits with 2."""

    @wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            status = command(*arguments, **options)
        except LlmqError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        raise SystemExit(status)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(wrapped)
    app()


def interpret(self_test: bool) -> None:
    """Turn on Triton's interpreter for a self-test. Must be called before triton is imported."""
    if self_test:
        os.environ["TRITON_INTERPRET"] = "1"


def seed_or_new(seed: int | None) -> int:
    """The seed, or a new random one."""
    return secrets.randbelow(1 << 31) if seed is None else seed


def numbers(name: str, text: str) -> tuple[int, ...]:
    """1,16 -> (1, 16). Raises `LlmqError` that names the option for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise LlmqError(f"--{name} must be whole numbers separated by commas; got {text!r}") from None


def dtypes(text: str) -> tuple[str, ...]:
    """float16,bfloat16 -> both names. Raises `LlmqError` for another name."""
    names = tuple(text.split(","))
    for name in names:
        if name not in DTYPES:
            raise LlmqError(f"--dtype must be {' or '.join(DTYPES)}; got {name!r}")
    return names
