"""Reads a folder of safetensors shards: headers first, then the requested tensors.

`open_checkpoint` reads and checks the index and every header, but no tensor. Its errors name the file and the tensor.
`Checkpoint.read` opens each shard that it needs, copies the tensors out and closes it again. An open handle would keep
every page that was read in memory; this way only the tensors that the caller keeps take memory.

A folder holds `model.safetensors`, or `model.safetensors.index.json` whose `weight_map` maps each tensor name to a
file. If it holds both, the single file is used, as in transformers. The index may contain plain file names only, since
a path could lead out of the folder. The files themselves may be symlinks, as in the Hugging Face cache.

Left out: pickles (`.bin`, `.pt`, `.pth`) are never opened, since opening one runs the code in it. GGUF is read by
`llmq.hf.source_gguf`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmq.errors import LlmqError
from llmq.names import first_names

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# safetensors' names of the dtypes that torch has, in the order in which safetensors' own writer sorts them.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder of safetensors.

    Fields:
        folder: the folder.
        tensors: every tensor in it, by name.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors called `names`, on the CPU. Each owns its memory; no file stays open or mapped.

        Raises `LlmqError` for an unknown name, and for a file that cannot be read or has changed since it was opened.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise LlmqError(f"{self.folder} has no tensor {name}")
            by_file.setdefault(self.tensors[name].file, []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, names_in_file in by_file.items():
            tensors.update(_read_file(file, names_in_file))
        for name, tensor in tensors.items():
            stored = self.tensors[name]
            if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
                raise LlmqError(
                    f"{stored.file} changed while it was being read: {name} has another dtype or shape now; run again"
                )
        return tensors


def open_checkpoint(folder: str | Path, variant: str | None = None) -> Checkpoint:
    """The safetensors checkpoint in `folder`. The index and the headers are read and checked, the tensors are not.

    variant: part of the files' names, as in `model.fp16.safetensors`.

    Raises `LlmqError` that names file and tensor if

        - there is no such folder, or it holds no safetensors;
        - a file is broken or truncated;
        - the index is broken, contains anything but names of files in the folder, or disagrees with its shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise LlmqError(f"a checkpoint must be a folder; {folder} {problem}; use an existing folder")
    middle = f".{variant}" if variant else ""
    single = folder / SINGLE.replace(".safetensors", f"{middle}.safetensors")
    index = folder / INDEX.replace(".json", f"{middle}.json")
    if single.is_file():
        return Checkpoint(folder, MappingProxyType(_header(single)))
    if not index.is_file():
        raise LlmqError(_no_safetensors(folder, single.name, index.name))
    weight_map = _weight_map(index)
    listed: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        listed.setdefault(file_name, set()).add(name)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(listed):
        header = _header(_shard(folder, file_name))
        _check_agreement(file_name, listed[file_name], set(header), weight_map)
        tensors.update(header)
    return Checkpoint(folder, MappingProxyType(tensors))


def open_files(files: Iterable[str | Path]) -> Checkpoint:
    """The checkpoint that consists of these safetensors files, without an index. Raises as `open_checkpoint`."""
    tensors: dict[str, StoredTensor] = {}
    paths = [Path(file) for file in files]
    for path in paths:
        header = _header(path)
        twice = sorted(set(header) & set(tensors))
        if twice:
            raise LlmqError(f"{first_names(twice)} is in {path.name} and also in {tensors[twice[0]].file.name}")
        tensors.update(header)
    return Checkpoint(paths[0].parent, MappingProxyType(tensors))


def _no_safetensors(folder: Path, single: str, index: str) -> str:
    """The error message for a folder without a checkpoint that can be read."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(PICKLES)]
    shards = [name for name in names if name.endswith(".safetensors")]
    start = f"{folder} has neither {single} nor {index}"
    if shards:
        return f"{start}: it has {first_names(shards)}, but no index of them; download the index as well"
    if pickles:
        return (
            f"{start}: it has {first_names(pickles)}; pickles are not read, since opening one runs the code in it; "
            "convert to safetensors"
        )
    return f"{start}; use a folder that holds a model in safetensors"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        parsed = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise LlmqError(f"{index} is not readable JSON: {error}; download it again") from None
    except _RepeatedKey as error:
        raise LlmqError(f"{index} must list each tensor once; it lists {error} twice; download it again") from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise LlmqError(f"{index} must have a weight_map from tensor names to files; download it again")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise LlmqError(f"{index} maps {name} to {file_name!r}, which is not a file name; download it again")
    return weight_map


class _RepeatedKey(Exception):
    """A JSON object has this key more than once."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises `_RepeatedKey`; json alone would keep the last value."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _RepeatedKey(key)
        values[key] = value
    return values


def _shard(folder: Path, file_name: str) -> Path:
    """The file called `file_name`. A path is refused, even one that ends inside the folder."""
    if file_name in ("", ".", "..") or any(sign in file_name for sign in "/\\:\0"):
        raise LlmqError(f"{folder / INDEX} may list files of its own folder only, without a path; got {file_name!r}")
    if not file_name.endswith(".safetensors"):
        raise LlmqError(f"{folder / INDEX} may list safetensors files only; got {file_name!r}")
    if not (folder / file_name).is_file():
        raise LlmqError(f"{folder / INDEX} lists {file_name}, which is not a file of the folder; download it again")
    return folder / file_name


def _header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. safetensors checks that offsets, shapes and the file's length agree."""
    tensors = {}
    try:
        with safe_open(file, framework="pt", device="cpu", backend="pread") as handle:
            for name in handle.keys():  # noqa: SIM118 (a handle is not iterable)
                view = handle.get_slice(name)
                code = view.get_dtype()
                if code not in DTYPES:
                    raise LlmqError(f"{file}: {name} has dtype {code}, which torch does not have; convert it")
                tensors[name] = StoredTensor(file, DTYPES[code], tuple(view.get_shape()))
    except (SafetensorError, OSError) as error:
        raise LlmqError(f"{file} is not a complete safetensors file: {error}; download or convert it again") from None
    return tensors


def _read_file(file: Path, names: list[str]) -> dict[str, Tensor]:
    try:
        # pread copies into memory that the tensor owns. The default maps the file, and mapped pages count as memory of
        # this process until the last tensor of the file is freed.
        with safe_open(file, framework="pt", device="cpu", backend="pread") as handle:
            return {name: handle.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise LlmqError(f"{file} cannot be read: {error}; run again, or download it again") from None


def _check_agreement(file_name: str, listed: set[str], stored: set[str], weight_map: Mapping[str, str]) -> None:
    """Raise unless the index and the shard contain the same tensors."""
    remedy = "download the index and the shards again"
    absent = sorted(listed - stored)
    if absent:
        raise LlmqError(f"the index lists {first_names(absent)} in {file_name}, which does not hold it; {remedy}")
    extra = sorted(stored - listed)
    twice = [name for name in extra if name in weight_map]
    if twice:
        raise LlmqError(f"{first_names(twice)} is in {file_name} and also in {weight_map[twice[0]]}; {remedy}")
    if extra:
        raise LlmqError(f"{file_name} holds {first_names(extra)}, which the index does not list; {remedy}")
