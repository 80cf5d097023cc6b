"""Experts that are fused into 3-D parameters, taken apart into one linear per expert and part.

The forward of a module with fused experts (`llmq.blocks.stacks`) takes one expert's matrix at a time (`self.gate_up_proj[e]`)
or multiplies all of them (`torch.bmm`). Here the parameters are replaced by objects that stand for them in the module's own
forward and run modules in their place. So each expert becomes ordinary linears (`experts.3.gate_proj`), every hook and every
method works on them, and no architecture's forward is written again. During quantization the weights of the linears are
views of the fused parameter, which `join` puts back; a loaded checkpoint has packed linears there instead.

That a block taken apart still computes the same is checked by running it (`llmq.quantization.experts`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.blocks.stacks import Part, Stack
from llmq.errors import LlmqError


class ExpertStack:
    """Stands for a 3-D parameter in its module's forward: `stack[e]` is expert e's matrix, and products with it run its
    linears.

    owner: the module. Its child called e holds the modules of expert e's parts, which map x [..., in] to [..., rows].
    """

    def __init__(self, stack: Stack, owner: nn.Module, like: Tensor) -> None:
        self._stack, self._owner, self._dtype, self._device = stack, owner, like.dtype, like.device

    @property
    def shape(self) -> torch.Size:
        """Of the parameter that it stands for."""
        rows, columns = self._stack.rows, self._stack.columns
        inner = (columns, rows) if self._stack.transposed else (rows, columns)
        return torch.Size((self._stack.experts, *inner))

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations that it is multiplied by."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the module lay when it was taken apart."""
        return self._device

    def size(self, dim: int) -> int:
        """As `Tensor.size`."""
        return self.shape[dim]

    def __len__(self) -> int:
        return self._stack.experts

    def __iter__(self) -> Iterator[ExpertMatrix]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> ExpertMatrix:
        expert = self._owner._modules[str(int(index))]
        assert expert is not None
        linears = [expert._modules[part.name] for part in self._stack.parts]
        return ExpertMatrix(self._stack, [linear for linear in linears if linear is not None])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`torch.bmm(x [E, n, in], stack)` and `torch.matmul`: each expert with its own rows."""
        if function in (torch.bmm, torch.matmul, Tensor.matmul, Tensor.bmm) and isinstance(args[1], ExpertStack):
            stack = args[1]
            return torch.stack([_product(x, stack[e], True) for e, x in enumerate(args[0].unbind(0))])
        return NotImplemented


class ExpertMatrix:
    """Stands for one expert's matrix: `F.linear(x, matrix)` and `x @ matrix` run the expert's linears."""

    def __init__(self, stack: Stack, linears: Sequence[nn.Module], flipped: bool = False) -> None:
        self._stack, self._linears, self._flipped = stack, linears, flipped

    @property
    def T(self) -> ExpertMatrix:
        """The transposed matrix."""
        return ExpertMatrix(self._stack, self._linears, not self._flipped)

    def t(self) -> ExpertMatrix:
        """The transposed matrix."""
        return self.T

    def transpose(self, first: int, second: int) -> ExpertMatrix:
        """The transposed matrix."""
        return self.T

    def to(self, *args: Any, **kwargs: Any) -> ExpertMatrix:
        """The same: products have the dtype of the rows that are multiplied."""
        return self

    def product(self, x: Tensor, as_inputs: bool) -> Tensor:
        """x times the matrix: [..., in] -> [..., out]. as_inputs: whether the product treats its rows as inputs."""
        if as_inputs != (self._stack.transposed != self._flipped):
            raise LlmqError(
                f"{self._stack.module} multiplies {self._stack.parameter} the other way round than its shape implies; "
                "such experts are not supported"
            )
        ys: list[Tensor] = [linear(x) for linear in self._linears]
        if len(ys) == 1:
            return ys[0]
        if self._stack.parts[0].step > 1:  # interleaved
            return torch.stack(ys, -1).flatten(-2)
        return torch.cat(ys, -1)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            matrix = args[1] if len(args) > 1 else kwargs["weight"]
            y = _product(args[0], matrix, False)
            return y if bias is None else y + bias
        if function in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
            return _product(args[0], args[1], True)
        return NotImplemented


def _product(x: Any, matrix: Any, as_inputs: bool) -> Tensor:
    if not isinstance(x, Tensor) or not isinstance(matrix, ExpertMatrix):
        raise TypeError("an expert's matrix can only be multiplied from the left")
    return matrix.product(x, as_inputs)


class Expert(nn.Module):
    """The linears of one expert, as children."""


def install(root: nn.Module, stack: Stack, make: Callable[[int, Part], nn.Module]) -> nn.Parameter:
    """Put an `ExpertStack` in the place of the parameter of `stack` in `root`; the parameter is returned.

    make: the module for a part of an expert.
    """
    module = root.get_submodule(stack.module)
    parameter = module._parameters.pop(stack.parameter)
    assert parameter is not None
    for expert in range(stack.experts):
        if str(expert) not in module._modules:
            module.add_module(str(expert), Expert())
        holder = module._modules[str(expert)]
        assert holder is not None
        for part in stack.parts:
            holder.add_module(part.name, make(expert, part))
    module.__dict__[stack.parameter] = ExpertStack(stack, module, parameter)
    module.__dict__["_is_hf_initialized"] = (
        True  # transformers has nothing to initialize here, and would fail on the stack
    )
    _run_eagerly(module)
    return parameter


def _run_eagerly(module: nn.Module) -> None:
    """Let transformers run the module's own forward, which indexes its parameters, and no grouped product."""
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) not in (None, "eager"):
        own: Any = copy.copy(config)  # the model's other modules keep theirs
        own._experts_implementation = "eager"
        module.config = own


def split(root: nn.Module, stacks: Sequence[Stack]) -> dict[str, nn.Parameter]:
    """Take the experts of `root` apart into linears whose weights are views of the fused parameters.

    Returns what `joined` needs: the parameters by name.
    """
    fused = {}
    for stack in stacks:
        name = f"{stack.module}.{stack.parameter}".lstrip(".")
        data = root.get_parameter(name).data

        def make(expert: int, part: Part, data: Tensor = data, stack: Stack = stack) -> nn.Linear:
            matrix = data[expert].T if stack.transposed else data[expert]
            linear = nn.Linear(stack.columns, part.rows, bias=False, device="meta")
            linear.weight = nn.Parameter(part.of(matrix), requires_grad=False)
            return linear

        fused[name] = install(root, stack, make)
    return fused


def join(root: nn.Module, stacks: Sequence[Stack], fused: Mapping[str, nn.Parameter]) -> None:
    """Undo `split`: the fused parameters, with what was written into the linears, are back in their modules."""
    for stack in stacks:
        module = root.get_submodule(stack.module)
        for expert in range(stack.experts):
            module._modules.pop(str(expert), None)
        for name in (stack.parameter, "_is_hf_initialized"):
            module.__dict__.pop(name, None)
        module._parameters[stack.parameter] = fused[f"{stack.module}.{stack.parameter}".lstrip(".")]


def expert_linears(root: nn.Module) -> set[str]:
    """The names of all modules inside experts that were taken apart."""
    return {
        f"{name}.{inner}" if name else inner
        for name, module in root.named_modules()
        if isinstance(module, Expert)
        for inner, _ in module.named_children()
    }


def alike_parameters(root: nn.Module) -> dict[int, int]:
    """The id of each parameter of an expert but the first -> that of its counterpart in the first expert of its module."""
    alike: dict[int, int] = {}
    for module in root.modules():
        experts = [child for child in module.children() if isinstance(child, Expert)]
        for other in experts[1:]:
            pairs = zip(experts[0].parameters(), other.parameters(), strict=True)
            alike |= {id(parameter): id(first) for first, parameter in pairs}
    return alike
