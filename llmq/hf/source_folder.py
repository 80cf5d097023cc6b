"""A model on disk, read one block at a time through transformers' own loading code.

The model is built on meta from its config. transformers' renaming rules then determine, for every stored tensor, which part
of the model it feeds: the part outside the blocks, or one block. Loading a part reads these tensors and passes them to
`convert_and_load_state_dict_in_model`, which renames, merges and casts exactly as `from_pretrained` does (including the
modules that stay in float32). A checkpoint that does not fit the model is refused from names and headers, before any
data is read.

Left out: parameters that the checkpoint lacks and that transformers would fill with random numbers. They are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import LlmqError
from llmq.hf.model_class import model_class
from llmq.hf.sidefiles import SideFiles
from llmq.hf.skeleton import build_skeleton, compute_buffers
from llmq.hf.source_base import Source, quiet
from llmq.names import first_names


@dataclass(frozen=True)
class Routes:
    """Which stored tensor becomes which entry of the model's state dict.

    Fields:
        feeds: stored name -> the entry that it becomes, or becomes a part of.
        filled: all entries that stored tensors feed.
        computed: stored names that are merged, split or reordered on loading, so that their shapes differ.
    """

    feeds: Mapping[str, str]
    filled: frozenset[str]
    computed: frozenset[str]


class FolderSource(Source):
    """A folder of safetensors. See `Source`."""

    streamed = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        device: str | torch.device,
        side: SideFiles,
        notes: tuple[str, ...] = (),
    ) -> None:
        with quiet():
            model = _skeleton(checkpoint, config, dtype)
            mapping = get_model_conversion_mapping(model)
        super().__init__(model, dtype, device, side, str(checkpoint.folder), notes)
        self.files = (checkpoint.folder,)
        self._checkpoint, self._mapping = checkpoint, mapping
        self._entries: dict[str, Tensor] = dict(model.state_dict())
        self._plan_dtypes = model._get_dtype_plan(dtype)
        routes = route(model, mapping, checkpoint)
        # As in `from_pretrained`: the conversions that this checkpoint needed. Saving reverses them.
        model._weight_conversions = [transform for transform in mapping if transform.was_used()]
        _refuse_misfits(checkpoint, routes, self._entries)
        repeated = self._repeated(routes)
        self._unfed = frozenset(set(self._entries) - routes.filled | repeated)
        missing = set(self._unfed)
        with quiet():
            model.tie_weights(missing_keys=missing, recompute_mapping=False)  # removes from the set what it ties
        self._refuse_missing(missing)
        self._keys: list[list[str]] = [[] for _ in range(1 + len(self))]
        for stored, name in routes.feeds.items():
            if name not in repeated:
                index = self._block_of(name)
                self._keys[0 if index is None else 1 + index].append(stored)
        self._notes += _unused_note(model, checkpoint, routes)
        self._computed = False

    def load_outer(self) -> None:
        if not self._computed:
            compute_buffers(self.model, self.device, self._unfed)
            self._computed = True
        self._load(self._keys[0], None)
        self.model.tie_weights(missing_keys=set(self._unfed), recompute_mapping=False)

    def load_block(self, index: int) -> nn.Module:
        self._load(self._keys[1 + index], index)
        return self._blocks[index]

    def release_block(self, index: int) -> None:
        for module in self._blocks[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = torch.empty_like(buffer, device="meta")

    def _dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self._entries.items()}

    def _load(self, keys: Iterable[str], index: int | None) -> None:
        """Read the stored tensors `keys` of one part and let transformers convert them and put them into the model.

        index: of the block; None for the part outside the blocks.
        """
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self._plan_dtypes,
            weight_mapping=self._mapping,
        )
        used = self.model._weight_conversions
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, self._checkpoint.read(keys), config, None)
        self.model._weight_conversions = used
        for name, error in info.conversion_errors.items():
            raise LlmqError(f"{name} cannot be converted from {self._checkpoint.folder}: {str(error).splitlines()[-1]}")
        for name, stored, expected in info.mismatched_keys:
            raise LlmqError(_mismatch(self._checkpoint, name, tuple(stored), tuple(expected)))
        absent = sorted(name for name in info.missing_keys - self._unfed if self._block_of(name) == index)
        if absent:
            raise LlmqError(f"{self._checkpoint.folder} has no data for {absent[0]}; download it again")
        for parameter in (self.model if index is None else self._blocks[index]).parameters():
            parameter.requires_grad_(False)

    def _repeated(self, routes: Routes) -> set[str]:
        """Tied entries that the checkpoint stores twice with equal values: they are tied and not loaded.

        If the values differ, the entries are not tied, whatever the config says, as in `from_pretrained`.
        """
        repeated: set[str] = set()
        for target, source in list(self.model.all_tied_weights_keys.items()):
            if target not in routes.filled or source not in routes.filled:
                continue
            if self._equal(routes, target, source):
                repeated.add(target)
            else:
                self.model.all_tied_weights_keys.pop(target)
                self.config.tie_word_embeddings = False
                self._notes += (
                    f"config.json ties {target} to {source}, but their stored values differ: they are not tied",
                )
        return repeated

    def _equal(self, routes: Routes, first: str, second: str) -> bool:
        stored = {name: [key for key, fed in routes.feeds.items() if fed == name] for name in (first, second)}
        if any(len(keys) != 1 for keys in stored.values()):
            return False
        (a,), (b,) = (self._checkpoint.read(keys).values() for keys in stored.values())
        return a.shape == b.shape and torch.equal(a, b)

    def _refuse_missing(self, missing: set[str]) -> None:
        """Raise if entries of the state dict have no data, other than buffers that transformers computes then."""
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        buffers = {name for name, _ in self.model.named_buffers()}
        absent = sorted(
            (name for name in missing if name not in buffers or not any(p.search(name) for p in ignored)),
            key=dot_natural_key,
        )
        if absent:
            raise LlmqError(
                f"{self._checkpoint.folder} lacks {first_names(absent)}, which {type(self.model).__name__} needs; "
                "use a complete causal language model"
            )


def _skeleton(checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` on meta. Raises `LlmqError` with the reason if its class cannot be built from the config."""
    found = model_class(config)
    assert found is not None, "checked when the config was read"
    try:
        return build_skeleton(found._from_config, config, dtype)
    except Exception as error:  # constructors raise anything on odd values
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LlmqError(
            f"{checkpoint.folder}: {found.__name__} cannot be built from config.json ({type(error).__name__}: {reason}); "
            "correct that value, or install what it needs"
        ) from error


def route(model: PreTrainedModel, mapping: list[WeightRenaming | WeightConverter], checkpoint: Checkpoint) -> Routes:
    """Which entry of the state dict every stored tensor feeds, by the rules of `convert_and_load_state_dict_in_model`."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    feeds, filled, computed = {}, set(), set()
    # The order matters: some renamings apply only after the first tensor of their kind.
    for stored in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state and stored in state:
            name, pattern = rename_source_key(stored, [], [], prefix, state)
        if name not in state:
            continue
        feeds[stored] = name
        filled.add(name)
        if pattern is not None:
            computed.add(stored)
            first, *others = of_pattern[pattern].target_patterns
            filled.update(name.replace(first, other) for other in others)
    return Routes(feeds, frozenset(filled), frozenset(computed))


def _refuse_misfits(checkpoint: Checkpoint, routes: Routes, entries: Mapping[str, Tensor]) -> None:
    """Raise for shapes that do not follow from the config, and for weights that are not floats of at least two bytes."""
    for key, name in routes.feeds.items():
        stored, expected = checkpoint.tensors[key], entries[name]
        if expected.is_floating_point() and not (stored.dtype.is_floating_point and stored.dtype.itemsize > 1):
            raise LlmqError(f"{key} is {stored.dtype}: the source is quantized already; use the original model")
        if key not in routes.computed and stored.shape != tuple(expected.shape):
            raise LlmqError(_mismatch(checkpoint, key, stored.shape, tuple(expected.shape)))


def _mismatch(checkpoint: Checkpoint, name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"{checkpoint.folder}: {name} has shape {list(stored)}, but config.json implies {list(expected)}; "
        "use weights and config.json of one model"
    )


def _unused_note(model: PreTrainedModel, checkpoint: Checkpoint, routes: Routes) -> tuple[str, ...]:
    """A note on stored tensors that the model does not use, other than those that transformers always ignores."""
    # Old checkpoints store these two, which are computed now.
    ignored = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())]
    pattern = re.compile("|".join(f"({each})" for each in ignored))
    unused = [name for name in checkpoint.tensors if name not in routes.feeds and not pattern.search(name)]
    if not unused:
        return ()
    return (f"{len(unused)} stored tensors are not part of the model and are left out, such as {unused[0]}",)
