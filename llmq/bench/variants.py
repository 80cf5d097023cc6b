"""One model in the forms that are measured beside each other: as it was, packed, and packed with linears joined.

    checkpoint   the original and the folder are opened as anybody would, the folder twice
    shape        random weights on the device; each linear of the blocks rounded to nearest and packed at once, nothing on disk

Of a shape there is one copy of the original and one of the packed weights: the packed model shares every other tensor with
the original, the joined one every stored tensor with the packed. Each form has its kernels' layouts.
"""

from __future__ import annotations

import copy
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
from llmq.hf.source_base import quiet
from llmq.hf.text_decoder import text_decoder
from llmq.methods.base import Target
from llmq.methods.rtn import rtn
from llmq.quantization.plan import make_plan
from llmq.serving.fused import fuse_linears, fused_linears, make_ready
from llmq.serving.linear import QuantLinear


@dataclass(frozen=True)
class Variant:
    """name: original, packed or fused. seconds: until it could answer. how: what was done in them."""

    name: str
    model: Any
    seconds: float
    how: str


def of_checkpoint(original: Any, folder: str, dtype: str, device: str) -> list[Variant]:
    """The original (what `open_model` takes), and the quantized folder without and with `fuse`.

    `LlmqError` where the original is packed itself.
    """
    began = time.perf_counter()
    model = open_model(original, dtype, device)[0]
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise LlmqError(f"{original} is packed itself: the first model must be the one that {folder} was made of")
    found = [Variant("original", model, _since(began, device), "opened, read and cast")]
    placed = {} if device == "cpu" else {"device_map": device}
    for name, fuse in (("packed", False), ("fused", True)):
        began = time.perf_counter()
        with quiet():
            model = load(folder, fuse=fuse, dtype=dtype, **placed).eval()
        make_ready(model)
        found.append(Variant(name, model, _since(began, device), "read with llmq.load, layouts made"))
    return found


def of_shape(shape: str, config: QuantConfig, dtype: torch.dtype, device: str, seed: int = 0) -> list[Variant]:
    """A random model of `llmq.bench.random_models`, and the same rounded to nearest as `config` says."""
    began = time.perf_counter()
    original = random_model(shape, dtype, device, seed)
    found = [Variant("original", original, _since(began, device), "random weights drawn on the device")]
    began = time.perf_counter()
    packed = packed_twin(original, config)
    make_ready(packed)
    found.append(Variant("packed", packed, _since(began, device), "rounded to nearest in memory, layouts made"))
    began = time.perf_counter()
    fused = sharing_copy(packed)
    fuse_linears(fused, text_decoder(fused.config, fused).module)
    make_ready(fused)
    found.append(Variant("fused", fused, _since(began, device), "packed weights shared, joined layouts made"))
    return found


@torch.no_grad()
def packed_twin(model: Any, config: QuantConfig) -> Any:
    """A model whose blocks' linears are those of `model` rounded to nearest; it shares every other tensor with it."""
    twin = sharing_copy(model)
    for name, row in make_plan(model, config, model.dtype, partial(shared_inputs, model)).linears.items():
        linear = model.get_submodule(name)
        target = Target(row.scheme.weight, linear.weight.dtype, str(config.scales), config.damping)
        rounded = rtn(linear.weight.float(), None, target).weight
        twin.set_submodule(name, QuantLinear.from_quantized(rounded, linear.bias))
    return twin.eval()


def sharing_copy(model: nn.Module) -> Any:
    """Modules of its own, the very tensors of `model`."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def held_bytes(model: nn.Module) -> int:
    """Memory of what a model's tensors lie in, its kernels' layouts included; what two tensors share is counted once."""
    found = {}
    for tensor in chain(model.parameters(), model.buffers(), _layout_tensors(model)):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _layout_tensors(model: nn.Module) -> Iterator[Tensor]:
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for linear in (*linears, *(group.stacked for group in fused_linears(model))):
        for _, layout in linear._layouts.values():
            values = (getattr(layout, field.name) for field in dataclasses.fields(layout))
            yield from (value for value in values if isinstance(value, Tensor))


def _since(began: float, device: str) -> float:
    wait(torch.device(device))
    return time.perf_counter() - began
