"""Experts that are fused into 3-D parameters: which there are, and the linears that they consist of.

transformers holds the experts of a layer in one module with parameters such as

    gate_up_proj [E, 2 I, H]   down_proj [E, H, I]      or transposed, [E, H, 2 I] and [E, I, H]

What a parameter holds is found from shapes: the columns of one are fed by the rows of the other, once or in pairs (gate and
up). `llmq.blocks.experts` takes them apart.
Left out: experts stored as one 2-D matrix (DBRX).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from llmq.errors import LlmqError


@dataclass(frozen=True)
class Part:
    """One linear of every expert.

    Fields:
        name: of the linear, after the expert's number.
        start, step: it has the rows start, start + step, ... of the expert's matrix [out, in].
        rows: how many those are.
    """

    name: str
    start: int
    step: int
    rows: int

    def of(self, matrix: Tensor) -> Tensor:
        """The view of this part's rows of matrix [out, in]."""
        return matrix[self.start : self.start + self.step * self.rows : self.step]


@dataclass(frozen=True)
class Stack:
    """A 3-D parameter that holds one matrix for each expert.

    Fields:
        module: the name of the module that has it.
        parameter: its name there.
        experts: how many.
        columns: in_features of every expert's matrix.
        transposed: whether a matrix is stored as [in, out].
        parts: the linears that an expert's matrix consists of.
    """

    module: str
    parameter: str
    experts: int
    columns: int
    transposed: bool
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """out_features of an expert's matrix."""
        return sum(part.rows for part in self.parts)

    def linear(self, expert: int, part: Part) -> str:
        """The name of one linear."""
        return f"{self.module}.{expert}.{part.name}"

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The names of all linears, expert by expert, and their shapes (N, K)."""
        for expert in range(self.experts):
            for part in self.parts:
                yield self.linear(expert, part), (part.rows, self.columns)

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """For each expert, the linears that read one input."""
        return tuple(tuple(self.linear(e, part) for part in self.parts) for e in range(self.experts))


def find_stacks(root: nn.Module) -> tuple[Stack, ...]:
    """The stacks of experts in `root`, in the order in which tokens pass through them within a module.

    Raises `LlmqError` for a 3-D parameter of which it cannot be told how it is multiplied.
    """
    found: list[Stack] = []
    for name, module in root.named_modules():
        named = {key: p for key, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if named and not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and _is_stack(module, named):
            found += _stacks_of(name, module, named)
    return tuple(found)


def _is_stack(module: nn.Module, named: Mapping[str, nn.Parameter]) -> bool:
    """Experts: matrices of more than one row and column, one for each of several experts.

    Biases and vectors that are kept as [1, 1, n] or [n, 1, k] (state-space layers, convolutions) are none, and neither are
    several square matrices of one size (the gates of a recurrence), unless the module says how it holds experts.
    """
    shapes = [tuple(p.shape) for p in named.values()]
    sizes = {size for shape in shapes for size in shape[1:]}
    if len(shapes) > 1 and len(sizes) == 1 and not hasattr(module, "is_transposed"):
        return False
    matrices = all(min(shape) > 1 or shape[0] == 1 < min(shape[1:]) for shape in shapes)
    return matrices and len({shape[0] for shape in shapes}) == 1


def _stacks_of(name: str, module: nn.Module, named: Mapping[str, nn.Parameter]) -> list[Stack]:
    stated = getattr(module, "is_transposed", None)
    concatenated = getattr(module, "is_concatenated", True)
    keys = list(named)
    if len(keys) == 1:
        p = named[keys[0]]
        return [_stack(name, keys[0], p, bool(stated), ("proj",), True)]
    if len(keys) != 2:
        raise LlmqError(_unclear(name, named))
    for first, second in (keys, keys[::-1]):
        for transposed in (False, True) if stated is None else (bool(stated),):
            (rows, width), (out, inner) = (_shape(named[key], transposed) for key in (first, second))
            if out == width and rows in (inner, 2 * inner):
                gated = rows == 2 * inner
                names = ("gate_proj", "up_proj") if gated else ("up_proj",)
                return [
                    _stack(name, first, named[first], transposed, names, concatenated),
                    _stack(name, second, named[second], transposed, ("down_proj",), True),
                ]
    raise LlmqError(_unclear(name, named))


def _unclear(name: str, named: Mapping[str, nn.Parameter]) -> str:
    shapes = ", ".join(f"{key} {list(p.shape)}" for key, p in named.items())
    return (
        f"{name} holds 3-D parameters ({shapes}) whose shapes do not show which feeds which: "
        f"experts like these are not supported; leave them out with --ignore 're:{name.replace('.', chr(92) + '.')}.*'"
    )


def _shape(parameter: Tensor, transposed: bool) -> tuple[int, int]:
    """(out, in) of one expert's matrix."""
    _, a, b = parameter.shape
    return (b, a) if transposed else (a, b)


def _stack(name: str, key: str, parameter: Tensor, transposed: bool, names: Sequence[str], concatenated: bool) -> Stack:
    rows, columns = _shape(parameter, transposed)
    size = rows // len(names)
    parts = tuple(
        Part(each, index * size, 1, size) if concatenated else Part(each, index, len(names), size)
        for index, each in enumerate(names)
    )
    return Stack(name, key, parameter.shape[0], columns, transposed, parts)


def stacks_of_blocks(stacks: Sequence[Stack], blocks: Sequence[str]) -> tuple[tuple[Stack, ...], ...]:
    """The stacks of each block, with module names inside the block."""
    return tuple(
        tuple(
            replace(stack, module=stack.module.removeprefix(f"{block}."))
            for stack in stacks
            if stack.module.startswith(f"{block}.")
        )
        for block in blocks
    )
