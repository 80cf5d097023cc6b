"""The command line: `llmq quantize | evaluate | generate`; each of `scripts/*.py` runs one of the same functions.

A command turns its arguments into one library call, prints a table, and ends stdout with one line of JSON. An invalid
argument or input is one line on stderr and exit status 2; Ctrl-C is one line and exit status 130. Nothing heavy is
imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq.cli.guard import interruptible, run_guarded
from llmq.cli.options import (
    ANY_MODEL_HELP,
    DATASET_HELP,
    DEFAULT_BITS,
    DEFAULT_DTYPE,
    DEFAULT_METHOD,
    DEMO_MODELS,
    METHOD_HELP,
    MODEL_HELP,
    SETTINGS,
    Bits,
    DatasetOption,
    DeviceOption,
    DtypeName,
    MethodName,
    QuietOption,
    RevisionOption,
    ScalesName,
    examples,
)
from llmq.config import Calibration, QuantConfig

app = typer.Typer(
    help="Quantize causal language models, evaluate them and generate text with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


# More than 50 lines, because every option is a parameter.
@app.command(context_settings=SETTINGS, epilog=examples("quantize"))
def quantize(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder to create (default: MODEL-METHOD-w4g128)")
    ] = None,
    method: Annotated[MethodName, typer.Option(help=METHOD_HELP)] = DEFAULT_METHOD,
    bits: Annotated[Bits, typer.Option(help="bits per weight")] = DEFAULT_BITS,
    group_size: Annotated[
        int, typer.Option(help="input columns that share a scale; -1: one scale per output channel")
    ] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="symmetric, or asymmetric with zero points")] = True,
    scales: Annotated[
        ScalesName | None,
        typer.Option(
            help="minmax: from the range of the weights; search: least weighted error (default: minmax for rtn, else search)"
        ),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help=f"calibration text: {DATASET_HELP}; self: the model generates its own")
    ] = "builtin",
    num_samples: Annotated[
        int, typer.Option("--num-samples", "--nsamples", help="maximum number of calibration windows")
    ] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", "--seqlen", help="tokens per calibration window")] = 2048,
    seed: Annotated[int, typer.Option(help="seed for drawing or generating the calibration windows")] = 0,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="linear to leave unquantized: its name, its class or re:REGEX; may be repeated"),
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="cast the model to this dtype before quantizing")] = DEFAULT_DTYPE,
    moe_all_experts: Annotated[
        bool, typer.Option("--moe-all-experts", help="calibrate every expert on every token; slower")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="maximum size of one weight file of the output")] = "5GB",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing checkpoint folder")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the predicted sizes and peak memory; quantize nothing")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize MODEL into a checkpoint folder in compressed-tensors format.

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
            all_experts=moe_all_experts,
        )
        chosen = Calibration(dataset, num_samples, seq_len, seed)
        calibration = None if chosen == Calibration() else chosen
        console = make_console(quiet)
        from llmq import api
        from llmq.memory import map_large_tensors

        map_large_tensors()
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

    run_guarded(run, "interrupted" if dry_run else "interrupted; the partial output was removed")


# More than 50 lines, because every option is a parameter.
@app.command(context_settings=SETTINGS, epilog=examples("evaluate"))
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=ANY_MODEL_HELP)],
    dataset: DatasetOption = "builtin",
    window: Annotated[int, typer.Option(help="tokens per window")] = 2048,
    limit: Annotated[int | None, typer.Option(help="evaluate at most this many windows (default: all)")] = None,
    batch_size: Annotated[int, typer.Option(help="windows per forward pass")] = 1,
    dtype: Annotated[
        DtypeName, typer.Option(help="dtype of all models; auto: float32 on a CPU, else bfloat16")
    ] = DEFAULT_DTYPE,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="original model: also print KL divergence and top-1 agreement with it; it stays loaded meanwhile"
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="also measure tokens/s; loads all models at the same time")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the perplexity of one or more models on the same text, and the difference to the first model."""

    def run() -> None:
        from llmq import evaluation
        from llmq.cli.console import make_console, print_evaluations, print_json, window_progress

        with window_progress(quiet) as progress:
            evaluations = evaluation.evaluate(
                [(name, open_named(name)) for name in models],
                original=None if against is None else open_named(against),
                metrics=("speed",) if speed else (),
                dataset=dataset,
                window=window,
                limit=limit,
                batch_size=batch_size,
                dtype=dtype.value,
                device=device,
                revision=revision,
                progress=progress,
            )
        print_evaluations(make_console(quiet), evaluations)
        lines = [each.to_dict(first=evaluations[0]) for each in evaluations]
        print_json(lines if len(lines) > 1 else lines[0])

    run_guarded(run)


@app.command(context_settings=SETTINGS, epilog=examples("generate"))
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=ANY_MODEL_HELP)],
    prompt: Annotated[str, typer.Option(help="text to answer or, with --raw, to continue")],
    max_new_tokens: Annotated[int, typer.Option(help="maximum number of new tokens")] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="do not apply the model's chat template to the prompt")] = False,
    dtype: Annotated[DtypeName, typer.Option(help="dtype of activations; auto: bfloat16")] = DEFAULT_DTYPE,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    quiet: QuietOption = False,
) -> None:
    """Generate text greedily and print it as it is generated. The prompt goes through the chat template, if there is one."""

    def run() -> None:
        from llmq.cli.console import print_json
        from llmq.evaluation import generate_text

        generated = generate_text(
            open_named(model),
            prompt,
            max_new_tokens=max_new_tokens,
            raw=raw,
            dtype=dtype.value,
            device=device,
            revision=revision,
            stream=not quiet,
        )
        print_json({"model": model, **generated.to_dict()})

    run_guarded(run)


def open_named(model: str) -> Any:
    """The source that a command-line name stands for: the embedded model for `demo` and `demo-general`, else the name."""
    return model if model not in DEMO_MODELS or Path(model).exists() else open_demo(model)


def open_demo(model: str) -> Any:
    """`demo`: the embedded model; `demo-general`: its copy with weights moved off the 4-bit grid (`llmq.demo`)."""
    from llmq.demo import demo_source, general_position

    source = demo_source()
    return source if model == "demo" else replace(source, prepare=general_position)


def default_output(model: str, config: QuantConfig) -> Path:
    """`MODEL-METHOD-w4g128` in the current folder, MODEL being the last part of the model's name.

    `+` becomes `-`, because hubs do not allow it in names.
    """
    from llmq.demo import DEMO_NAME

    name = (Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]).removesuffix(".gguf")
    if model in DEMO_MODELS:
        name = DEMO_NAME + model.removeprefix("demo")
    group = "" if config.group_size < 0 else f"g{config.group_size}"
    return Path(f"{name}-{config.method.replace('+', '-')}-w{config.bits}{group}{'' if config.symmetric else '-asym'}")


def main() -> None:
    """The `llmq` command."""
    app()


def run_script(command: Callable[..., None]) -> None:
    """Run one command as a script of its own (`scripts/*.py`)."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(context_settings=SETTINGS, epilog=examples(command.__name__))(command)
    single()


if __name__ == "__main__":
    main()
