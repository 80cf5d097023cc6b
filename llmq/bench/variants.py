"""One model in the forms that are compared: the original, packed, and packed with linears fused.

    checkpoint   the original and the folder are opened as a user would, the folder twice
    shape        random weights on the device; each linear of the blocks is rounded to nearest and packed, nothing on disk

For a shape there is one copy of the original and one of the packed weights: the packed model shares every other tensor with
the original, the fused model every stored tensor with the packed one. Each form has its kernels' layouts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from llmq.bench.random_models import random_model
from llmq.config import QuantConfig
from llmq.errors import LlmqError
from llmq.eval.models import wait
from llmq.hf.forward import shared_inputs
from llmq.hf.inference import open_model
from llmq.hf.quantizer import load
from llmq.hf.skeleton import sharing_copy
from llmq.hf.source_base import quiet
from llmq.hf.text_decoder import text_decoder
from llmq.methods.base import Target
from llmq.methods.rtn import rtn
from llmq.quantization.plan import make_plan
from llmq.serving.fused import fuse_linears, fused_linears, make_ready
from llmq.serving.linear import QuantLinear


@dataclass(frozen=True)
class Variant:
    """One form of a model."""

    name: str
    """original, packed or fused."""
    model: Any
    """In eval mode, with its kernels' layouts made."""
    seconds: float
    """The time to make it."""
    how: str
    """How it was made."""


def of_checkpoint(original: Any, folder: str, dtype: str, device: str) -> list[Variant]:
    """The original (any argument of `open_model`), and the quantized folder without and with `fuse`.

    Raises `LlmqError` if the original is packed.
    """
    began = time.perf_counter()
    model = open_model(original, dtype, device)[0]
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise LlmqError(f"{original} is packed; the first model must be the original of {folder}")
    variants = [Variant("original", model, _since(began, device), "opened, read and cast")]
    placed = {} if device == "cpu" else {"device_map": device}
    for name, fuse in (("packed", False), ("fused", True)):
        began = time.perf_counter()
        with quiet():
            model = load(folder, fuse=fuse, dtype=dtype, **placed).eval()
        make_ready(model)
        variants.append(Variant(name, model, _since(began, device), "read with llmq.load, layouts made"))
    return variants


def of_shape(shape: str, config: QuantConfig, dtype: torch.dtype, device: str, seed: int = 0) -> list[Variant]:
    """A random model of `llmq.bench.random_models`, and the same model rounded to nearest with `config`."""
    began = time.perf_counter()
    original = random_model(shape, dtype, device, seed)
    variants = [Variant("original", original, _since(began, device), "random weights drawn on the device")]
    began = time.perf_counter()
    packed = round_and_pack(original, config)
    make_ready(packed)
    variants.append(Variant("packed", packed, _since(began, device), "rounded to nearest in memory, layouts made"))
    began = time.perf_counter()
    fused = sharing_copy(packed)
    fuse_linears(fused, text_decoder(fused.config, fused).module)
    make_ready(fused)
    variants.append(Variant("fused", fused, _since(began, device), "packed weights shared, fused layouts made"))
    return variants


@torch.no_grad()
def round_and_pack(model: Any, config: QuantConfig) -> Any:
    """A model whose blocks' linears are those of `model` rounded to nearest; it shares every other tensor with it."""
    packed = sharing_copy(model)
    for name, row in make_plan(model, config, model.dtype, partial(shared_inputs, model)).linears.items():
        linear = model.get_submodule(name)
        target = Target(row.scheme.weight, linear.weight.dtype, str(config.scales), config.damping)
        rounded = rtn(linear.weight.float(), None, target).weight
        packed.set_submodule(name, QuantLinear.from_quantized(rounded, linear.bias))
    return packed.eval()


def resident_bytes(model: nn.Module) -> int:
    """Memory of a model's tensors, its kernels' layouts included; storage that two tensors share is counted once."""
    storages = {}
    for tensor in chain(model.parameters(), model.buffers(), _layout_tensors(model)):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def packed_linears(model: nn.Module) -> list[QuantLinear]:
    """Every packed linear of a model, those that stand for several fused ones included."""
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return [*linears, *(group.stacked for group in fused_linears(model))]


def _layout_tensors(model: nn.Module) -> Iterator[Tensor]:
    for linear in packed_linears(model):
        for _, layout in linear._layouts.values():
            values = (getattr(layout, field.name) for field in dataclasses.fields(layout))
            yield from (value for value in values if isinstance(value, Tensor))


def _since(began: float, device: str) -> float:
    wait(torch.device(device))
    return time.perf_counter() - began
