"""Linears that read one input, run as one packed matmul: query, key and value; gate and up.

    q_proj(x) ──► one matmul of the rows of q, k and v ──► y [.., Nq + Nk + Nv] ──► its first Nq columns
    k_proj(x), v_proj(x) ──► the columns that are theirs, of the same y

Which linears belong together is seen, not known: the model is run on two tokens, its packed linears answering with zeros,
and those of one module that are handed the very same tensor are joined (`shared_inputs`). Calling code stays as it is: each
linear is still a module of its own. Whichever is called first with an x computes for all and leaves the others their
columns, each to be taken once. They are found by the identity of x, and computed anew wherever that does not hold:
x is another tensor, or was written to, or a second thread came between.

What is stored stays with each linear, so that state dicts, saving, moving and loading know nothing of this; joined is the
layout that a kernel makes (`Kernel.supports_fusion`), in the place of the linears' own. Kernels that read the stored tensors
would gain nothing and need a copy: there the linears run one by one. Outputs are the same bits where a kernel computes a row
of the weight alike whatever the number of rows; the Triton kernel splits sums by that number, and then rounds otherwise.

Left out: experts that two tokens do not reach; linears of different modules (parallel attention beside its MLP). The columns
are views of y, so that their rows are not adjacent. Where x is changed in place in inference mode, which keeps no count
of changes, between a call of one linear and the first call of another with it, the second does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from llmq.core.packing import pack, unpack
from llmq.errors import LlmqError
from llmq.kernels.problem import Packed, Problem
from llmq.serving.linear import QuantLinear, forward_overridden, under_autocast

TOKENS = 2


class Joined:
    """Linears that are run as one. members: those, in the order of their rows. `LlmqError` where they cannot be."""

    def __init__(self, members: Sequence[QuantLinear], names: Sequence[str]) -> None:
        reason = _refusal(members)
        if reason:
            raise LlmqError(f"{', '.join(names)} cannot be fused: they {reason}; load without fuse")
        self.members, self.names = tuple(members), tuple(names)
        self.whole = Whole(members)
        self.sizes = [member.out_features for member in members]
        self.left: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def output(self, place: int, x: Tensor) -> Tensor | None:
        """y of member `place` for x [.., K]; None where the kernel for it joins nothing."""
        left, version = self.left, _version(x)  # one reading: another thread may replace it
        if left is not None and left[0] is x and left[1] == version:
            y = left[2].pop(place, None)
            if y is not None:
                if not left[2]:
                    self.left = None
                return y
        joined = self.whole.run_joined(x)
        if joined is None:
            return None
        parts = dict(enumerate(joined.split_with_sizes(self.sizes, -1)))
        y = parts.pop(place)
        self.left = (x, version, parts)
        return y

    def forget(self) -> None:
        self.left = None
        self.whole._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "left": None}


class Whole(QuantLinear):
    """The rows of several linears as one. It stores nothing: its own parameters stay on meta, and what kernels see is made
    of the members' tensors.
    """

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        first = members[0]
        rows = sum(member.out_features for member in members)
        super().__init__(first.in_features, rows, first.grid, first.weight_scale.dtype, None, first.kernel, "meta")
        self._biases: tuple[tuple[Tensor, ...], Tensor] | None
        self.members = tuple(members)  # a tuple, which torch takes for no submodule

    def run_joined(self, x: Tensor) -> Tensor | None:
        """y [.., N of all]; None where the kernel for x joins nothing."""
        x = under_autocast(x)
        kernel = self._kernel_for(x)
        return self._through(kernel, x) if kernel.supports_fusion else None

    def problem(self, dtype: torch.dtype) -> Problem:
        return replace(super().problem(dtype), scale_dtype=self.members[0].weight_scale.dtype)

    def ready(self, dtype: torch.dtype, rows: int = 1) -> None:
        """As of each linear; where the kernel joins nothing, theirs."""
        kernel = self._kernel(dtype, rows, self.device)
        if kernel.supports_fusion:
            self._layout(kernel)
            self._bias(dtype)
        else:
            for member in self.members:
                member.ready(dtype, rows)

    def packed(self) -> Packed:
        parts = [member.packed() for member in self.members]
        zeros = [part.zero for part in parts if part.zero is not None]
        return replace(
            parts[0],
            out_features=self.out_features,
            weight=torch.cat([part.weight for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero=_zeros(zeros, [part.out_features for part in parts], self.grid.bits) if zeros else None,
            parts=tuple(parts),
        )

    def _stored(self) -> tuple[Tensor | None, ...]:
        return tuple(chain.from_iterable([member._stored() for member in self.members]))

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        if self.members[0]._parameters["bias"] is None:
            return None
        biases: tuple[Tensor, ...] = tuple(member.bias for member in self.members if member.bias is not None)
        kept = self._biases
        if kept and kept[1].dtype == dtype and all(a is b for a, b in zip(kept[0], biases, strict=True)):
            return kept[1]
        if torch.compiler.is_compiling() or any(bias.requires_grad for bias in biases):
            return torch.cat([bias.to(dtype) for bias in biases])
        with torch.inference_mode(False), torch.no_grad():
            joined = torch.cat([bias.to(dtype) for bias in biases])
        self._biases = (biases, joined)
        return joined

    def _forget(self) -> None:
        super()._forget()
        self._biases = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_biases": None}


def join(model: nn.Module) -> list[Joined]:
    """Join the linears of `model` that read one input, in place; those that were joined are joined anew.

    Raises `LlmqError` where weights are offloaded, where linears of one input differ in grid, dtype, device or in having a
    bias, and where the model cannot be run on two tokens.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, module in linears.items():
        if module.streamed or module.weight_packed.is_meta:
            raise LlmqError(f"{name} is offloaded, and joined layouts are kept in memory: load without fuse")
    made = [Joined([linears[name] for name in names], names) for names in shared_inputs(model)]
    for module in linears.values():
        module.together = None
    for joined in made:
        for member in joined.members:
            member._forget()
            member.together, member.place = joined, joined.members.index(member)
    return made


def joined_linears(model: nn.Module) -> list[Joined]:
    """The groups that `join` made, in the model's order."""
    found = (module.together for module in model.modules() if isinstance(module, QuantLinear))
    return list({id(one): one for one in found if isinstance(one, Joined)}.values())


def make_ready(model: nn.Module, dtype: torch.dtype | None = None, rows: int = 1) -> None:
    """Make the layouts that forwards of `model` with `rows` rows need, where weights are in memory.

    dtype: of activations (default: the model's). A layout that is there already is kept.
    """
    kind = dtype or model_dtype(model)
    for joined in joined_linears(model):
        joined.whole.ready(kind, rows)
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.together is None and not module.streamed:
            module.ready(kind, rows)


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a transformers model's activations; float32 where it does not say."""
    stated = getattr(model, "dtype", None)
    return stated if isinstance(stated, torch.dtype) else torch.float32


def shared_inputs(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of the packed linears of one module that are handed the very same tensor, in execution order."""
    seen: list[tuple[str, Tensor]] = []
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    names = {id(module): name for name, module in linears.items()}

    def zeros_of(linear: QuantLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            seen.append((names[id(linear)], x))
            return x.new_zeros(*x.shape[:-1], linear.out_features)

        return forward

    body = getattr(model, "base_model", model)
    device = next(parameter.device for parameter in model.parameters())
    try:
        with torch.no_grad(), forward_overridden(list(linears.values()), zeros_of):
            body(input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device=device), use_cache=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise LlmqError(f"fuse must run the model on two tokens, and it fails: {error}") from error
    groups: dict[tuple[str, int], list[str]] = {}
    for name, x in seen:
        groups.setdefault((name.rpartition(".")[0], id(x)), []).append(name)
    return [tuple(dict.fromkeys(names)) for names in groups.values() if len(set(names)) > 1]


def _refusal(members: Sequence[QuantLinear]) -> str | None:
    """Why linears cannot be one (what follows "they"); None where they can."""
    told: dict[str, set[object]] = {
        "have different bits, groups or symmetry": {str(member.grid) for member in members},
        "have scales of different dtypes": {str(member.weight_scale.dtype) for member in members},
        "are on different devices": {str(member.device) for member in members},
        "are partly with a bias, or have biases of different dtypes": {
            None if member.bias is None else str(member.bias.dtype) for member in members
        },
        "are forced onto different kernels": {member.kernel for member in members},
    }
    return next((f"{why} ({', '.join(map(str, values))})" for why, values in told.items() if len(values) > 1), None)


def _version(x: Tensor) -> int:
    """How often x was written to, where that is counted."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _zeros(zeros: Sequence[Tensor], rows: Sequence[int], bits: int) -> Tensor:
    """Zero points packed along N, one after the other: [ceil(N * bits / 32), G]."""
    if all(count * bits % 32 == 0 for count in rows[:-1]):
        return torch.cat(list(zeros))
    codes = [unpack(zero.T.contiguous(), bits, count) for zero, count in zip(zeros, rows, strict=True)]
    return pack(torch.cat(codes, 1), bits).T.contiguous()
