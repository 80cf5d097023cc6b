"""GPT-2's linears, which are stored as [in, out]: taken for linears while a block is quantized.

transformers' `Conv1D` computes x @ weight + bias. In its place a linear is put whose weight is a view of the transposed
parameter, so that what is written into it is written into the model. On disk such a linear is packed as any other, under its
own name; `llmq.load` puts a packed linear in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def transposed_linears(root: nn.Module) -> dict[str, nn.Module]:
    """The modules of `root` that are linears stored as [in, out], by name."""
    return {name: module for name, module in root.named_modules() if type(module).__name__ == "Conv1D"}


def as_linear(module: nn.Module) -> nn.Linear:
    """A linear that computes what `module`, one of `transposed_linears`, does, on views of its parameters."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.data.T, requires_grad=False)
    if isinstance(bias, nn.Parameter):
        linear.bias = bias
    return linear


@contextmanager
def straightened(root: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """While open, the transposed linears of `root` (those called `names`; default: all) are linears."""
    found = {name: m for name, m in transposed_linears(root).items() if names is None or name in names}
    for name, module in found.items():
        root.set_submodule(name, as_linear(module))
    try:
        yield
    finally:
        for name, module in found.items():
            root.set_submodule(name, module)
