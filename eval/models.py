"""What evaluations ask of any model: its context, its vocabulary, where ids go, when it is done, and that it be in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def context_length(model: nn.Module) -> int | None:
    """Positions that the model's config admits; None where it names no limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the model's input embedding; None where it has no `get_input_embeddings`."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find(), "weight", None) if find is not None else None
    return len(weight) if isinstance(weight, Tensor) else None


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameter that has memory (offloaded ones are on meta)."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def random_ids(model: nn.Module, batch_size: int, tokens: int, seed: int = 0) -> Tensor:
    """Seeded random ids int64 `[batch_size, tokens]` of the model's vocabulary, where the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary_size(model) or 1, (batch_size, tokens), generator=generator)
    return ids.to(input_device(model))


def wait(device: torch.device) -> None:
    """Kernels of a GPU are queued: the clock may be read only after they ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
