"""Properties of models that evaluations need: context, vocabulary, input device; and eval mode, random ids, GPU waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and inference mode inside; every module's own training flag is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def context_length(*models: nn.Module) -> int | None:
    """The smallest number of positions that the configs of the models allow; None if no config states a limit."""
    lengths = []
    for model in models:
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        length = getattr(text, "max_position_embeddings", None)
        if isinstance(length, int):
            lengths.append(length)
    return min(lengths, default=None)


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the model's input embedding; None if the model has no `get_input_embeddings`."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find(), "weight", None) if find is not None else None
    return len(weight) if isinstance(weight, Tensor) else None


def input_device(model: nn.Module) -> torch.device:
    """The device for token ids: that of the first parameter with memory (offloaded parameters are on meta)."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def random_ids(model: nn.Module, batch_size: int, tokens: int, seed: int = 0) -> Tensor:
    """Seeded random ids from the model's vocabulary: int64 `[batch_size, tokens]`, on the model's input device.

    They depend on the arguments only, not on torch's default device or global generator.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    size = (batch_size, tokens)
    ids = torch.randint(vocabulary_size(model) or 1, size, generator=generator, dtype=torch.int64, device="cpu")
    return ids.to(input_device(model))


def wait(device: torch.device) -> None:
    """Block until all kernels queued on a GPU have finished, so that a clock may be read; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
