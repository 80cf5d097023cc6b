"""Writing a checkpoint tensor by tensor, in any order, so that neither the model nor a shard is ever in memory.

All names, dtypes and shapes are known before the first tensor is. Shards are planned from them, every shard file is
made at its full size with its header, and each tensor's bytes go to their place as it arrives. A file is, to the
byte, what `safetensors.torch.save_file` would write of the same tensors: an 8-byte length, a JSON header padded with
spaces to a multiple of 8, the data; wide dtypes first (so that all are aligned), then by name. One shard is
`model.safetensors`; several are `model-00001-of-0000N.safetensors` with an index, which is written last.

The folder is staged beside its target (`llmq.checkpoint.staging`) and renamed by `commit`, after every shard has been
opened again and compared with the plan. Its space is reserved at the start where the system can do that, so that a
disk that is too small is found out before hours of work and not after them.

Left out: checksums (the manifest's business) and big-endian machines.
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
METADATA = {"format": "pt"}  # transformers refuses files that do not say this
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Shard:
    """One planned file. header: its first bytes; places: where each tensor starts in the file; nbytes: its length."""

    file: str
    header: bytes
    places: Mapping[str, int]
    nbytes: int


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_size: int | str = "5GB") -> tuple[Shard, ...]:
    """The files that will hold `specs`, filled in their order; a tensor larger than a shard gets one of its own.

    Raises `LlmqError` for no tensors, a dtype that safetensors lacks, or a size that cannot be read.
    """
    if not specs:
        raise LlmqError("a checkpoint must hold at least one tensor")
    for name, spec in specs.items():
        if spec.dtype not in _CODES:
            raise LlmqError(f"{name} has dtype {spec.dtype}, which safetensors cannot hold")
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
    """A checkpoint of the tensors `specs` that will be the folder `target`. A context manager: leaving it without
    `commit` removes all that was written and leaves an old target as it was; a full disk becomes an `LlmqError`.

    target: missing parents are made. overwrite: an old model folder is replaced at the end.
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
        """Where side files (config, tokenizer, report) go; the target itself once committed."""
        return self._staged.folder

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.nbytes for shard in self._shards)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place. Raises `LlmqError` unless it is planned, as planned, and not written yet."""
        spec, shard = self._specs.get(name), self._shard_of.get(name)
        if spec is None or shard is None:
            raise LlmqError(f"{name} is not part of the planned checkpoint")
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise LlmqError(
                f"{name} was planned as {spec.dtype} {list(spec.shape)}; got {tensor.dtype} {list(tensor.shape)}"
            )
        waiting = self._waiting[shard.file]
        if name not in waiting:
            raise LlmqError(f"{name} was written twice")
        path = self.folder / shard.file
        with writing(path, spec.nbytes):
            if spec.nbytes:
                _put(path, shard.places[name], tensor)
            waiting.remove(name)
            if not waiting:
                sync(path)  # now, and not all at the end: the disk works while the next block is computed

    def commit(self) -> None:
        """Check that all is there, and rename the folder to the target. Raises `LlmqError` where something is not."""
        missing = [name for names in self._waiting.values() for name in sorted(names)]
        if missing:
            raise LlmqError(f"{len(missing)} tensors of the checkpoint were not written, the first is {missing[0]}")
        if len(self._shards) > 1:
            self._write_index()
        found = {name: TensorSpec(t.dtype, t.shape) for name, t in open_checkpoint(self.folder).tensors.items()}
        wrong = [name for name in {**found, **self._specs} if found.get(name) != self._specs.get(name)]
        if wrong:
            raise LlmqError(f"{self.folder} does not read back as it was written: {wrong[0]}; check the disk")
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
    """Make the file that long, with its space set aside where the system and the filesystem can do that."""
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
