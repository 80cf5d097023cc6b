"""A model taken apart: what lies outside the decoder blocks, and the blocks, one at a time.

`Source` is what the rest of the library sees, whatever the model came from. `model` always is a whole
`PreTrainedModel` in structure; what of it holds data is decided by `load_outer`, `load_block` and `release_block`.
Where data comes from is the business of the two kinds: `FolderSource` (shards on disk) and `InMemorySource` (a model in
memory).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from llmq.blocks.capture import find_blocks
from llmq.checkpoint.staging import writing
from llmq.errors import LlmqError
from llmq.formats.compressed_tensors import TensorSpec
from llmq.hf.sidefiles import SideFiles
from llmq.hf.stored_names import Names, plan_names, stored_tensors


class Source(ABC):
    """A causal LM to be quantized.

    model: in eval mode; parameters that are not loaded are on meta (streamed) or still the caller's (held).
    config: its config, with `dtype` set. dtype, device: of loaded parameters. streamed: whether blocks are read one at
    a time. notes: what was not done as asked, for the report. description: where it came from.
    files: where its weights are read from, if they are.
    blocks_name: the dotted name of the list of decoder blocks; its length is `len(source)`.
    """

    streamed: bool

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: str | torch.device,
        side: SideFiles,
        description: str,
        notes: tuple[str, ...],
    ) -> None:
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self.device = torch.device(device)
        self.description = description
        self.blocks_name, self._blocks = find_blocks(model)
        self.files: tuple[Path, ...] = ()
        self._notes = notes
        self._side = side
        self._names: Names | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._notes, *self._side.notes)

    @abstractmethod
    def load_outer(self) -> None:
        """Give every parameter and buffer outside the blocks its data, and every computed buffer its value."""

    @abstractmethod
    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its data; the caller may change it. It stands in `model` until released."""

    @abstractmethod
    def release_block(self, index: int) -> None:
        """Drop the data of a loaded block, changes included."""

    @abstractmethod
    def _dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every entry of the state dict once it is loaded."""

    def tensor_plan(self) -> dict[str, tuple[str, TensorSpec]]:
        """What `save_pretrained` would write, in its order, without data: name -> (parameter's name, dtype and shape).

        The parameter's name is "" for a tensor that transformers computes from others (experts out of a fused tensor).
        """
        return dict(self._planned().plan)

    def checkpoint_name(self, module_name: str) -> str:
        """The checkpoint's name for the linear `module_name`.

        Raises `LlmqError` for one inside a block whose weight is stored in another form: it has no name of its own.
        """
        weight = f"{module_name}.weight"
        stored = self._planned().renamed.get(weight)
        if stored is not None:
            return stored.removesuffix(".weight")
        if self._part(weight) is not None:
            raise LlmqError(
                f"{weight} is stored merged or split, so that it cannot be quantized under a name of its own"
            )
        return module_name

    def outer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors of what `load_outer` loaded; perhaps the caller's own: do not write to them."""
        state = {name: tensor for name, tensor in self.model.state_dict().items() if self._part(name) is None}
        yield from stored_tensors(self.model, self._planned(), state)

    def block_tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors of a loaded block, as it stands."""
        prefix = f"{self.blocks_name}.{index}."
        state = {f"{prefix}{name}": tensor for name, tensor in self._blocks[index].state_dict().items()}
        if any(tensor.device.type == "meta" for tensor in state.values()):
            raise LlmqError(f"block {index} must be loaded before its tensors are taken")
        yield from stored_tensors(self.model, self._planned(), state)

    def tokenizer(self) -> Any:
        """The source's tokenizer. Raises `LlmqError` with the reason where there is none."""
        return self._side.tokenizer()

    def write_side_files(self, folder: Path, quantization_config: Mapping[str, Any]) -> None:
        """Write config, generation config, tokenizer and chat template into `folder`; never code, never weights."""
        with writing(folder, 0):
            self._side.write(folder, self.model, self.dtype, quantization_config)

    def _part(self, name: str) -> int | None:
        """The block that a state-dict entry belongs to; None outside the blocks."""
        prefix = f"{self.blocks_name}."
        return int(name[len(prefix) :].split(".", 1)[0]) if name.startswith(prefix) else None

    def _parts(self) -> list[list[str]]:
        """All state-dict entries: those outside the blocks, then those of each block."""
        parts: list[list[str]] = [[] for _ in range(1 + len(self._blocks))]
        for name in self.model.state_dict():
            index = self._part(name)
            parts[0 if index is None else 1 + index].append(name)
        return parts

    def _planned(self) -> Names:
        if self._names is None:
            self._names = plan_names(self.model, self._dtypes(), self._parts())
        return self._names


@contextmanager
def quiet() -> Iterator[None]:
    """While open, transformers shows no progress bars and logs errors only; its settings are put back."""
    bars, verbosity, hub_bars = (
        hf_logging.is_progress_bar_enabled(),
        hf_logging.get_verbosity(),
        not are_progress_bars_disabled(),
    )
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # and the hub's with it, which may have been off
            if not hub_bars:
                disable_progress_bars()
