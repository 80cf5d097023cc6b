"""A causal LM as the tensors outside its decoder blocks and the blocks, one at a time.

The rest of the library sees only `Source`, whatever the origin of the model. `Source.model` always has the
structure of the whole `PreTrainedModel`; `load_outer`, `load_block` and `release_block` decide which of its parameters
hold data. There are two kinds: `FolderSource` reads the data from shards on disk, `InMemorySource` from a loaded model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from llmq.blocks.capture import find_blocks
from llmq.checkpoint.staging import writing
from llmq.errors import LlmqError
from llmq.hf.experts import Experts, find_experts
from llmq.hf.sidefiles import SideFiles
from llmq.hf.stored_names import Names, Stored, plan_names, stored_tensors


class Source(ABC):
    """A causal LM that is going to be quantized.

    Attributes:
        model: the model, in eval mode. Parameters that are not loaded are on meta (`FolderSource`) or are still the
            caller's own (`InMemorySource`).
        config: the model's config, with `dtype` set.
        dtype: the dtype of loaded parameters, apart from those that the architecture keeps in float32.
        device: the device of loaded parameters.
        streamed: whether blocks are read from disk one at a time.
        description: where the model comes from, for the report.
        files: the files and folders that its weights are read from; empty for a loaded model.
        blocks_name: the dotted name of the list of decoder blocks. Its length is `len(source)`.
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
        self._experts: Experts | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from what the caller may expect, for the report. It is the same before and after a run."""
        return (*self._notes, *self._side.notes)

    @abstractmethod
    def load_outer(self) -> None:
        """Load every parameter and buffer outside the blocks, and compute the buffers that no file holds."""

    @abstractmethod
    def load_block(self, index: int) -> nn.Module:
        """Load block `index`. The caller may change it; it is part of `model` until it is released."""

    @abstractmethod
    def release_block(self, index: int) -> None:
        """Drop the data of a loaded block, changes included."""

    @abstractmethod
    def _dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every entry of the state dict once it is loaded."""

    def tensor_plan(self) -> tuple[Stored, ...]:
        """What `save_pretrained` would write, in its order, without data."""
        return tuple(self._planned().plan.values())

    def checkpoint_name(self, module_name: str) -> str:
        """The checkpoint's name for the linear `module_name`.

        Raises `LlmqError` for a linear inside a block whose weight is stored merged or split: it has no name there.
        """
        weight = f"{module_name}.weight"
        stored = self._planned().renamed.get(weight)
        if stored is not None:
            return stored.removesuffix(".weight")
        if module_name in self.experts.stored:
            return self.experts.stored[module_name]
        if self._block_of(weight) is not None:
            raise LlmqError(
                f"a linear must be stored under a name of its own to be quantized; {weight} is stored merged or split; "
                "ignore it"
            )
        return module_name

    @property
    def experts(self) -> Experts:
        """The fused experts of the model, and their names in files."""
        if self._experts is None:
            self._experts = find_experts(self.model, self._planned().renamed)
        return self._experts

    def outer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors of what `load_outer` loaded. They may be the caller's own: do not write to them.

        Raises `LlmqError`, naming it, for a tensor that holds NaN or inf.
        """
        state = {name: tensor for name, tensor in self.model.state_dict().items() if self._block_of(name) is None}
        for name, tensor in state.items():
            check_finite(name, tensor)
        yield from stored_tensors(self.model, self._planned(), state)

    def block_tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and current tensors of a loaded block. Raises `LlmqError` if it is not loaded."""
        prefix = f"{self.blocks_name}.{index}."
        state = {f"{prefix}{name}": tensor for name, tensor in self._blocks[index].state_dict().items()}
        if any(tensor.device.type == "meta" for tensor in state.values()):
            raise LlmqError(f"block {index} must be loaded before its tensors are taken")
        yield from stored_tensors(self.model, self._planned(), state)

    def tokenizer(self) -> Any:
        """The source's tokenizer. Raises `LlmqError` with the reason if there is none."""
        return self._side.tokenizer()

    def write_side_files(self, folder: Path, quantization_config: Mapping[str, Any]) -> None:
        """Write config, generation config, tokenizer and chat template into `folder`; never code, never weights.

        Needs no loaded parameters, so that a run can do this first. A missing tokenizer is left out (see `notes`).
        Raises `LlmqError` for what cannot be saved or written.
        """
        with writing(folder, 0):
            self._side.write(folder, self.model, self.dtype, quantization_config)

    def _block_of(self, name: str) -> int | None:
        """The index of the block that an entry of the state dict belongs to; None outside the blocks."""
        prefix = f"{self.blocks_name}."
        return int(name[len(prefix) :].split(".", 1)[0]) if name.startswith(prefix) else None

    def _parts(self) -> list[list[str]]:
        """The entries of the state dict: first those outside the blocks, then those of each block."""
        parts: list[list[str]] = [[] for _ in range(1 + len(self._blocks))]
        for name in self.model.state_dict():
            index = self._block_of(name)
            parts[0 if index is None else 1 + index].append(name)
        return parts

    def _planned(self) -> Names:
        if self._names is None:
            self._names = plan_names(self.model, self._dtypes(), self._parts())
        return self._names


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `LlmqError`, naming the tensor, if it holds NaN or inf."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise LlmqError(
            f"{name} holds NaN or inf: the source is broken, or overflows in {str(tensor.dtype).removeprefix('torch.')}; "
            "repair it, or choose --dtype bfloat16 or float32 if it overflows"
        )


class _HubOutput:
    """The settings of transformers and huggingface_hub for progress bars and logging, which are global.

    Several threads may want silence at once: the first one to come saves and changes the settings, the last one to
    leave restores them.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._saved = False, 0, False  # transformers' bars enabled, verbosity, the hub's bars enabled

    def silence(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
            self._saved = bars, verbosity, not are_progress_bars_disabled()
            hf_logging.disable_progress_bar()
            hf_logging.set_verbosity_error()

    def restore(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            bars, verbosity, hub_bars = self._saved
            hf_logging.set_verbosity(verbosity)
            if bars:
                hf_logging.enable_progress_bar()  # enables the hub's bars, too, which may have been disabled
                if not hub_bars:
                    disable_progress_bars()


_HUB_OUTPUT = _HubOutput()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers shows no progress bars and logs errors only inside. Its settings are restored at the end.

    May be nested, and entered by several threads: the settings are restored when the last one leaves.
    """
    _HUB_OUTPUT.silence()
    try:
        yield
    finally:
        _HUB_OUTPUT.restore()
