"""Writes a checkpoint tensor by tensor, in any order; neither the model nor a whole shard is ever in memory.

All names, dtypes and shapes are known in advance. From them the shards are planned, and every shard file is created
with its header at its full size. Each tensor's bytes are then written to their place when the tensor arrives. A file
has exactly the bytes that `safetensors.torch.save_file` would write for the same tensors: an 8-byte length, a JSON
header padded with spaces to a multiple of 8, then the data, wide dtypes first (so that all are aligned), then by name.
One shard is called `model.safetensors`; several are called `model-00001-of-0000N.safetensors`, with an index that is
written last.

The folder is staged next to its target (`llmq.checkpoint.staging`). `commit` opens every shard again, compares it with
the plan and renames the folder. Disk space is reserved at the start if the system supports it, so that a disk that is
too small is found before hours of work.

Left out: checksums and big-endian machines.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from llmq.checkpoint.reader import DTYPES, INDEX, open_checkpoint
from llmq.checkpoint.staging import FULL, StagedFolder, sync, writing
from llmq.errors import LlmqError
from llmq.formats.base import TensorSpec

PATTERN = "model{suffix}.safetensors"
METADATA = {"format": "pt"}  # transformers refuses files without this
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Shard:
    """One planned file.

    Fields:
        file: the file's name.
        header: its first bytes.
        places: the offset of each tensor in the file, in bytes.
        nbytes: the length of the file.
    """

    file: str
    header: bytes
    places: Mapping[str, int]
    nbytes: int


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_size: int | str = "5GB") -> tuple[Shard, ...]:
    """The files that will hold `specs`, filled in their order. A tensor larger than a shard gets a shard of its own.

    max_shard_size: bytes, or a string such as `5GB`.
    Raises `LlmqError` for no tensors, a dtype that safetensors lacks, or a size that cannot be parsed.
    """
    if not specs:
        raise LlmqError("a checkpoint must hold at least one tensor; got none")
    for name, spec in specs.items():
        if spec.dtype not in _CODES:
            raise LlmqError(f"{name} has dtype {spec.dtype}, which safetensors cannot store; cast it first")
    empty = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    try:
        if not re.search("[1-9]", str(max_shard_size)) or str(max_shard_size).strip().startswith("-"):
            raise ValueError("it must be positive")
        split = split_torch_state_dict_into_shards(empty, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    except ValueError as error:
        raise LlmqError(f"max_shard_size must be a size like 5GB or 500MB; got {max_shard_size!r}: {error}") from None
    return tuple(
        _shard(file, {name: specs[name] for name in names}) for file, names in split.filename_to_tensors.items()
    )


def _shard(file: str, specs: Mapping[str, TensorSpec]) -> Shard:
    entries: dict[str, object] = {"__metadata__": METADATA}
    offsets, end = {}, 0
    for name, spec in sorted(specs.items(), key=lambda item: (-_RANKS[item[1].dtype], item[0].encode())):
        offsets[name] = end
        end += spec.nbytes
        entries[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return Shard(file, header, {name: len(header) + start for name, start in offsets.items()}, len(header) + end)


@final
class StagedCheckpoint:
    """A checkpoint of the tensors `specs` that will be the folder `target`. Used as a context manager.

    If the context is left without `commit`, everything written is removed and an old target stays as it was. A full
    disk becomes an `LlmqError`.

    target: missing parents are created.
    specs: dtype and shape of every tensor, by name, in the order in which shards are filled.
    max_shard_size: see `plan_shards`.
    overwrite: an old quantized checkpoint at `target` is replaced at the end.
    Raises `LlmqError` at once, before any work: see `plan_shards` and `StagedFolder`.
    """

    def __init__(
        self,
        target: str | Path,
        specs: Mapping[str, TensorSpec],
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
    ) -> None:
        self._specs = dict(specs)
        self._shards = plan_shards(specs, max_shard_size)
        self._waiting = {shard.file: set(shard.places) for shard in self._shards}
        self._shard_of = {name: shard for shard in self._shards for name in shard.places}
        self._staged = StagedFolder(target, self.nbytes, overwrite)
        try:
            for shard in self._shards:
                self._make(shard)
        except BaseException:
            self._staged.discard()
            raise

    def __enter__(self) -> StagedCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, OSError) and error.errno in FULL:  # a side file that did not fit
                with writing(self.folder, 0):
                    raise error
        finally:
            self._staged.discard()

    @property
    def folder(self) -> Path:
        """The folder for side files (config, tokenizer, report); the target itself once committed."""
        return self._staged.folder

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self._shards)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place.

        Raises `LlmqError` unless the tensor is planned, has the planned dtype and shape, and is not written yet.
        """
        spec, shard = self._specs.get(name), self._shard_of.get(name)
        if spec is None or shard is None:
            raise LlmqError(f"only planned tensors can be written; {name} is not part of the planned checkpoint")
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise LlmqError(
                f"{name} was planned as {spec.dtype} {list(spec.shape)}; got {tensor.dtype} {list(tensor.shape)}"
            )
        waiting = self._waiting[shard.file]
        if name not in waiting:
            raise LlmqError(f"each tensor can be written once; {name} was written twice")
        path = self.folder / shard.file
        with writing(path, spec.nbytes):
            if spec.nbytes:
                _put(path, shard.places[name], tensor)
            waiting.remove(name)
            if not waiting:
                sync(path)  # now, so that the disk works while the next block is computed

    def commit(self) -> None:
        """Check that everything was written and rename the folder to the target.

        Raises `LlmqError` if a tensor is missing or a file does not read back as planned.
        """
        missing = [name for names in self._waiting.values() for name in sorted(names)]
        if missing:
            raise LlmqError(
                f"all planned tensors must be written before commit; {len(missing)} are missing, the first is {missing[0]}"
            )
        if len(self._shards) > 1:
            self._write_index()
        stored = {name: TensorSpec(t.dtype, t.shape) for name, t in open_checkpoint(self.folder).tensors.items()}
        wrong = [name for name in {**stored, **self._specs} if stored.get(name) != self._specs.get(name)]
        if wrong:
            raise LlmqError(f"{self.folder} does not read back as it was written: {wrong[0]} differs; check the disk")
        self._staged.publish()

    def _make(self, shard: Shard) -> None:
        path = self.folder / shard.file
        with writing(path, shard.nbytes), open(path, "wb") as file:
            file.write(shard.header)
            file.flush()
            _reserve(file.fileno(), shard.nbytes)

    def _write_index(self) -> None:
        total = sum(spec.nbytes for spec in self._specs.values())
        weight_map = {name: shard.file for shard in self._shards for name in shard.places}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = self.folder / INDEX
        with writing(path, 0):
            path.write_text(json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _reserve(handle: int, nbytes: int) -> None:
    """Extend the file to `nbytes`, and reserve the disk space if the system and the filesystem support it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.truncate(handle, nbytes)


def _put(path: Path, place: int, tensor: Tensor) -> None:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(flat.numpy().data)
