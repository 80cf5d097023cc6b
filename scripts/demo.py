"""`make demo`: quantize a small model with three methods, compare them, and generate text with the best one.

The model comes as a 4-bit file and is dequantized first, so that its weights are already on a grid of 16 levels per 32
columns. The same is therefore done with a copy whose weights are moved off that grid (`llmq.demo`), on which the
comparison of methods is fair.
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
METHODS = {
    "rtn": "RTN (round to nearest)",
    "gptq": "GPTQ (error feedback)",
    "awq+gptq": "AWQ, then GPTQ (salient channels scaled up, then error feedback)",
}
MODELS = {
    "demo": "The model as shipped, from a 4-bit file",
    "demo-general": "A copy of it whose weights are moved off the 4-bit grid",
}


def main() -> None:
    """Quantize, compare and answer."""
    import llmq
    from llmq.evaluation import evaluate, generate_text

    console = make_console(quiet=False)
    lines = []
    for model, title in MODELS.items():
        console.print(f"\n{title}", style="bold")
        folders = {}
        for method, name in METHODS.items():
            folders[method] = OUT / f"{model}-{method}"
            with block_progress(not sys.stderr.isatty()) as progress:
                report = llmq.quantize(
                    open_named(model),
                    folders[method],
                    llmq.QuantConfig(method=method, group_size=64),
                    llmq.Calibration("builtin", WINDOWS, SEQ_LEN),
                    overwrite=True,
                    progress=progress,
                )
            console.print(f"{name}: {report.seconds:.0f} s, written to {folders[method]}")
        sources = [("original", open_named(model)), *folders.items()]
        with window_progress(False) as shown:
            evaluations = evaluate(sources, window=SEQ_LEN, limit=EVALUATED, progress=shown)
        lines += [each.to_dict(first=evaluations[0]) | {"model": f"{model} {each.model}"} for each in evaluations]
        print_evaluations(console, evaluations)
    console.print("\nThe model quantized with AWQ, then GPTQ, answers a question:", style="bold")
    generate_text(OUT / "demo-awq+gptq", "What is the capital of France?", max_new_tokens=60)
    print_json(lines)


if __name__ == "__main__":
    run_guarded(main)
