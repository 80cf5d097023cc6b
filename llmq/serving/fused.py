"""Fusing linears that read the same input into one packed matmul: query, key and value; gate and up.

    q_proj(x) ──► one matmul over the rows of q, k and v ──► y [.., Nq + Nk + Nv] ──► its first Nq columns
    k_proj(x), v_proj(x) ──► their own columns of the same y

No table of names says which linears belong together. The model runs once on two tokens with its packed linears returning
zeros, and the linears of one module that receive the same tensor object are fused (`shared_inputs`). Calling code does
not change: each linear remains a module of its own. Whichever is called first with an x computes all outputs and keeps
the others' columns, each to be taken once. They are found by the identity of x, and recomputed when x is another tensor,
was written to, or was replaced by another thread's. They are dropped when x is freed (but not in a compiled forward).

Stored tensors stay with each linear, so state dicts, saving, moving and loading are unaffected. Only the layout that a
kernel makes is shared (`Kernel.supports_fusion`) and takes the place of the members' own. Kernels that read the stored tensors
directly would gain nothing and need a copy; there the linears run one by one. Outputs are the same bits where a kernel
computes a weight row independently of the number of rows. The Triton kernel splits sums by that number and then rounds
differently.

Left out: experts that neither of the two tokens reaches; linears of different modules (attention parallel to its MLP).
The columns are views of y, so their rows are not contiguous. Inference mode keeps no count of in-place changes: if x is
changed in place there, between the call of one linear and the first call of another with the same x, the second returns
its output for the old x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from llmq.core.packing import pack, unpack
from llmq.errors import LlmqError
from llmq.kernels.problem import Packed, Problem
from llmq.serving.autocast import cast_by_autocast
from llmq.serving.linear import QuantLinear
from llmq.serving.overrides import forward_overridden
from llmq.serving.weight import versions, watch

TRIAL_TOKENS = 2

Pending = tuple["ref[Tensor] | Tensor", int, dict[int, Tensor]]
"""An input (in a compiled forward itself, else a weak reference), its version, and the outputs not taken yet."""


class FusedLinears:
    """Linears that run as one matmul. Raises `LlmqError` where they cannot.

    members: the linears, in the order of their rows.
    names: their names, for messages.
    stacked: their rows as one linear.
    pending: outputs of members that have not been called yet with the last input; None where there are none.
    """

    def __init__(self, members: Sequence[QuantLinear], names: Sequence[str]) -> None:
        reason = _refusal(members)
        if reason:
            raise LlmqError(f"{', '.join(names)} cannot be fused: {reason}; load without fuse")
        self.members, self.names = tuple(members), tuple(names)
        self.stacked = StackedLinear(members)
        self.sizes = [member.out_features for member in members]
        self.pending: Pending | None = None

    def output(self, position: int, x: Tensor) -> Tensor | None:
        """y of the member at `position` for x [.., K]; None where the kernel for x cannot fuse."""
        pending, version = self.pending, _version(x)  # read once: another thread may replace it
        if pending is not None and pending[1] == version and _is_input(pending[0], x):
            y = pending[2].pop(position, None)
            if y is not None:
                if not pending[2]:
                    self.pending = None
                return y
        outputs = self.stacked.run_fused(x)
        if outputs is None:
            return None
        parts = dict(enumerate(outputs.split_with_sizes(self.sizes, -1)))
        y = parts.pop(position)
        self.pending = (x if torch.compiler.is_compiling() else ref(x, self._drop_outputs), version, parts)
        return y

    def _drop_outputs(self, freed: ref[Tensor]) -> None:
        """Drop the outputs of an input that was freed."""
        pending = self.pending
        if pending is not None and pending[0] is freed:
            self.pending = None

    def drop_caches(self) -> None:
        self.pending = None
        self.stacked._drop_caches()

    def dissolve(self) -> None:
        """Let every member run alone from now on."""
        for member in self.members:
            member.fusion = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": None}


class StackedLinear(QuantLinear):
    """The rows of several linears as one. It stores nothing: its own parameters stay on meta, and kernels get the
    members' tensors.
    """

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        first = members[0]
        rows = sum(member.out_features for member in members)
        scheme = replace(first.scheme, scale_dtype=first.weight_scale.dtype)
        super().__init__(first.in_features, rows, scheme, None, first.kernel, "meta")
        self._biases: tuple[tuple[Tensor, ...], Tensor, tuple[int, ...]] | None
        self.members = tuple(members)  # a tuple, so that torch does not register them as submodules

    def run_fused(self, x: Tensor) -> Tensor | None:
        """y [.., N of all members]; None where the kernel for x cannot fuse."""
        x = cast_by_autocast(x)
        kernel = self._kernel_for(x)
        return self._run_kernel(kernel, x) if kernel.supports_fusion else None

    def problem(self, dtype: torch.dtype) -> Problem:
        return replace(super().problem(dtype), scale_dtype=self.members[0].weight_scale.dtype)

    def ready(self, dtype: torch.dtype, rows: int = 1) -> None:
        """As `QuantLinear.ready`; where the kernel cannot fuse, make the members' layouts."""
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
            zero=_zeros(zeros, [part.out_features for part in parts], self.scheme.weight.bits) if zeros else None,
            parts=tuple(parts),
        )

    def _stored(self) -> tuple[Tensor | None, ...]:
        return tuple(chain.from_iterable([member._stored() for member in self.members]))

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        if self.members[0]._parameters["bias"] is None:
            return None
        biases: tuple[Tensor, ...] = tuple(member.bias for member in self.members if member.bias is not None)
        cached = self._biases
        same = cached is not None and all(a is b for a, b in zip(cached[0], biases, strict=True))
        if cached and same and cached[1].dtype == dtype and cached[2] == _written(biases):
            return cached[1]
        if torch.compiler.is_compiling() or any(bias.requires_grad for bias in biases):
            return torch.cat([bias.to(dtype) for bias in biases])
        with torch.inference_mode(False), torch.no_grad():
            stacked = torch.cat([bias.to(dtype) for bias in biases])
        watch(biases)
        self._biases = (biases, stacked, _written(biases))
        return stacked

    def _drop_caches(self) -> None:
        super()._drop_caches()
        self._biases = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_biases": None}


def fuse_linears(model: nn.Module, decoder: nn.Module | None = None) -> list[FusedLinears]:
    """Fuse the linears of `model` that read the same input, in place. Linears that were fused are fused anew.

    decoder: the module to run on two tokens (`shared_inputs`).
    Raises `LlmqError` where weights are offloaded, where linears with the same input differ in grid, dtype, device or in
    having a bias, and where the model cannot be run on two tokens.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, module in linears.items():
        if module.offloaded or module.weight_packed.is_meta:
            raise LlmqError(f"{name} is offloaded, and fused layouts stay in memory: load without fuse")
    groups = [FusedLinears([linears[name] for name in names], names) for names in shared_inputs(model, decoder)]
    for module in linears.values():
        module.fusion = None
    for group in groups:
        for position, member in enumerate(group.members):
            member._drop_caches()
            member.fusion, member.position = group, position
    return groups


def fused_linears(model: nn.Module) -> list[FusedLinears]:
    """The groups that `fuse_linears` made, in the model's order."""
    fusions = (module.fusion for module in model.modules() if isinstance(module, QuantLinear))
    return list({id(group): group for group in fusions if isinstance(group, FusedLinears)}.values())


def make_ready(model: nn.Module, dtype: torch.dtype | None = None, rows: int = 1) -> None:
    """Make the layouts that forwards of `model` with `rows` rows need, for weights that are in memory.

    dtype: of activations (default: the model's). Layouts that exist are kept.
    """
    dtype = dtype or model_dtype(model)
    for group in fused_linears(model):
        group.stacked.ready(dtype, rows)
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.fusion is None and not module.offloaded:
            module.ready(dtype, rows)


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a transformers model's activations; float32 for a module that states none."""
    stated = getattr(model, "dtype", None)
    return stated if isinstance(stated, torch.dtype) else torch.float32


def shared_inputs(model: nn.Module, decoder: nn.Module | None = None) -> list[tuple[str, ...]]:
    """Names of the packed linears of one module that receive the same tensor object, in execution order.

    decoder: the part of `model` to run on two tokens, called with `input_ids` and `use_cache` (default: all of it).
    Raises `LlmqError` where that fails.
    """
    seen: list[tuple[str, Tensor]] = []
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    names = {id(module): name for name, module in linears.items()}

    def record_input(linear: QuantLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            seen.append((names[id(linear)], x))
            return x.new_zeros(*x.shape[:-1], linear.out_features)

        return forward

    device = next(parameter.device for parameter in model.parameters())
    ids = torch.zeros(1, TRIAL_TOKENS, dtype=torch.long, device=device)
    try:
        with torch.no_grad(), forward_overridden(list(linears.values()), record_input):
            (model if decoder is None else decoder)(input_ids=ids, use_cache=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise LlmqError(f"fuse runs the model on {TRIAL_TOKENS} tokens first, which failed: {error}") from error
    groups: dict[tuple[str, int], list[str]] = {}
    for name, x in seen:
        groups.setdefault((name.rpartition(".")[0], id(x)), []).append(name)
    return [tuple(dict.fromkeys(names)) for names in groups.values() if len(set(names)) > 1]


def _refusal(members: Sequence[QuantLinear]) -> str | None:
    """Why linears cannot be fused; None where they can."""
    properties: dict[str, set[object]] = {
        "bits, groups or symmetry differ": {str(member.scheme.weight) for member in members},
        "scale dtypes differ": {str(member.weight_scale.dtype) for member in members},
        "devices differ": {str(member.device) for member in members},
        "some have a bias and others do not, or bias dtypes differ": {
            None if member.bias is None else str(member.bias.dtype) for member in members
        },
        "they are forced onto different kernels": {member.kernel for member in members},
    }
    return next(
        (f"{why} ({', '.join(map(str, values))})" for why, values in properties.items() if len(values) > 1), None
    )


def _is_input(kept: ref[Tensor] | Tensor, x: Tensor) -> bool:
    """Whether x is the input that was kept. Tests for `ref`, since isinstance with Tensor costs 0.2 microseconds."""
    return (kept() if isinstance(kept, ref) else kept) is x


def _version(x: Tensor) -> int:
    """How many in-place writes x has seen; 0 where torch does not count them."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _written(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The versions of tensors; not counted in a compiled forward."""
    return () if torch.compiler.is_compiling() else versions(tensors)


def _zeros(zeros: Sequence[Tensor], rows: Sequence[int], bits: int) -> Tensor:
    """Zero points of several weights, packed along N as those of one: [ceil(N * bits / 32), G]."""
    if all(count * bits % 32 == 0 for count in rows[:-1]):
        return torch.cat(list(zeros))
    codes = [unpack(zero.T.contiguous(), bits, count) for zero, count in zip(zeros, rows, strict=True)]
    return pack(torch.cat(codes, 1), bits).T.contiguous()
