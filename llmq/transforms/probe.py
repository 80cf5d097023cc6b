"""A probe of a decoder block: a float64 copy on the CPU with other parameters, on which invariances can be seen exactly.

Every parameter is an odd multiple of a power of two between -1 and 1: never 0 and never -1, so that no channel is silent
and 1 + w stays exact under doubling. The biases and norms of fresh models would be 0 and 1, and hide what they do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call, Stop, all_results
from llmq.blocks.experts import alike_parameters, expert_linears

EXPONENTS = (-2, -1, 1, 2)
BYTES_PER_PARAMETER = 8
"""Of the copy; what is drawn at a time comes on top."""


class Probe:
    """The float64 copy of a block on the CPU, with other parameters.

    Fields:
        modules: the copy's modules by name.
        inputs: what its linears read, in the order in which they run.
        output: what it computes, one vector (`llmq.blocks.capture.all_results`).
    """

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor) -> None:
        self._generator = torch.Generator().manual_seed(0)
        alike = alike_parameters(block)  # one expert's parameters stand for all experts of a layer
        empty: dict[int, nn.Parameter] = {}
        for p in block.parameters():
            if id(p) not in alike:
                empty[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=torch.float64), False)
        empty |= {other: empty[first] for other, first in alike.items()}
        self.block = copy.deepcopy(block, dict(empty)).cpu().double()  # the memo keeps the data from being copied
        for parameter in self.block.parameters():
            parameter.data.copy_(self._odd(parameter.shape))
            if parameter.ndim > 1:
                parameter.data.mul_(2.0 ** -round(math.log2(parameter.shape[-1]) / 2 - 1))
        self._call = Call(call.place, _double(call.args), _double(call.kwargs))
        self._hidden = self._odd(hidden.shape) * 4
        self.modules: dict[str, Any] = dict(self.block.named_modules())
        self._of_experts = expert_linears(self.block)  # they are no producers: each sees some tokens only
        self.inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Any] = {}
        self.output = self._trace()

    def run(self) -> Tensor:
        """All that the block computes, in one vector."""
        with torch.no_grad():
            return all_results(self._call, self._call(self.block, self._hidden))

    def read(self, name: str) -> Tensor:
        """The input of linear `name`: [tokens, K]."""
        caught: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            caught.append(inputs[0].clone())
            raise Stop

        handle = self.modules[name].register_forward_pre_hook(stop)
        try:
            self.run()
        except Stop:
            pass
        finally:
            handle.remove()
        return caught[0].reshape(-1, caught[0].shape[-1])

    def exponents(self, count: int) -> Tensor:
        """Random exponents of two, int64 [count]."""
        return random_exponents(count, self._generator)

    def _odd(self, shape: torch.Size) -> Tensor:
        """Odd multiples of 1/16 between -1 and 1: never zero, never -1."""
        drawn = torch.randint(-7, 7, shape, dtype=torch.int8, generator=self._generator)
        return drawn.double().mul_(2).add_(1).div_(16)

    def _trace(self) -> Tensor:
        """One run of the block, keeping what linears read, in their order, and what modules without children return."""

        def keep_input(name: str) -> Any:
            return lambda _, inputs: self.inputs.__setitem__(name, inputs[0])

        def keep_output(name: str) -> Any:
            return lambda _, __, output: self._outputs.__setitem__(name, output)

        handles = []
        for name, module in self.modules.items():
            if isinstance(module, nn.Linear) and name not in self._of_experts:
                handles.append(module.register_forward_pre_hook(keep_input(name)))
            elif not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(keep_output(name)))
        try:
            return self.run()
        finally:
            for handle in handles:
                handle.remove()

    def source_of(self, consumer: str) -> str | None:
        """The module without children whose very output the linear `consumer` reads."""
        x = self.inputs[consumer]
        for name, output in self._outputs.items():
            if not isinstance(output, Tensor) or (output.shape[-1], output.numel()) != (x.shape[-1], x.numel()):
                continue
            if output.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                return name
        return None


def random_exponents(count: int, generator: torch.Generator) -> Tensor:
    """`EXPONENTS`, drawn: int64 [count]."""
    return torch.tensor(EXPONENTS)[torch.randint(len(EXPONENTS), (count,), generator=generator)]


def _double(value: Any) -> Any:
    """Arguments on the CPU, their floating tensors in float64. Mappings are copied: what the probe writes stays its own."""
    if isinstance(value, Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, Mapping):
        return {key: _double(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_double(item) for item in value)
    return value
