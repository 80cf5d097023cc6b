"""`make demo`: quantize the embedded model with RTN, GPTQ and AWQ before GPTQ, compare, and let the result answer a question.

The model comes from a 4-bit file and is dequantized first, so its weights already lie on a grid of 16 levels. The same
is therefore done with a copy in general position (`llmq.demo`), on which the comparison of methods is a fair one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmq.cli.commands import open_named
from llmq.cli.console import make_console, print_evaluations, print_json, window_progress
from llmq.cli.guard import run_guarded
from llmq.cli.progress import block_progress

OUT = Path("demo-out")
WINDOWS, SEQ_LEN, EVALUATED = 16, 512, 12
METHODS = ("rtn", "gptq", "awq+gptq")
NAMES = {"demo": "the model as shipped (out of a 4-bit file)", "demo-general": "its copy in general position"}


def main() -> None:
    import llmq
    from llmq.evaluation import evaluate, generate_text

    console = make_console(quiet=False)
    lines = []
    for model, words in NAMES.items():
        console.print(f"\n{words}", style="bold")
        paths = {}
        for method in METHODS:
            paths[method] = OUT / f"{model}-{method}"
            with block_progress(not sys.stderr.isatty()) as progress:
                report = llmq.quantize(
                    open_named(model),
                    paths[method],
                    llmq.QuantConfig(method=method, group_size=64),
                    llmq.Calibration("builtin", WINDOWS, SEQ_LEN),
                    overwrite=True,
                    progress=progress,
                )
            console.print(f"{method}: {report.seconds:.0f} s -> {paths[method]}")
        sources = [("original", open_named(model)), *paths.items()]
        with window_progress(False) as shown:
            evaluations = evaluate(sources, window=SEQ_LEN, limit=EVALUATED, progress=shown)
        lines += [each.to_dict(first=evaluations[0]) | {"model": f"{model} {each.model}"} for each in evaluations]
        print_evaluations(console, evaluations)
    console.print("\nthe model made by AWQ and GPTQ answers:", style="bold")
    generate_text(OUT / "demo-awq+gptq", "What is the capital of France?", max_new_tokens=60)
    print_json(lines)


if __name__ == "__main__":
    run_guarded(main)
