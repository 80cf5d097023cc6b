"""Reading a folder of safetensors shards: headers first, then the tensors that are asked for.

`open_checkpoint` reads and checks the index and every header, and no tensor; whatever is wrong with the folder is
said here, by name. `Checkpoint.read` then opens each shard that it needs, copies the tensors out and closes it: a
handle that stays open keeps every page that it touched, so memory follows what the caller holds and nothing else.

A folder holds `model.safetensors`, or `model.safetensors.index.json` whose `weight_map` sends each tensor name to a
file. Where both are there the single file is meant, as in transformers. A file name of the index must be a plain
name: a path could leave the folder. The file itself may be a symlink, since the snapshots of the Hugging Face cache
are made of them.

Left out: pickles (`.bin`, `.pt`, `.pth`) are never opened, since opening one runs the code in it; GGUF is not
streamed.
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

# safetensors' names of the dtypes that torch has, in the order in which the format's own writer ranks them.
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
    """Where one tensor lies and what it is, known from the header alone."""

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
    """A checked folder of safetensors. tensors: every tensor in it, by name."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors called `names`, on the CPU, each owning its memory; no file stays open or mapped.

        Raises `LlmqError` for a name that is not there, and for a file that cannot be read or has changed since.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise LlmqError(f"{self.folder} has no tensor {name}")
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            found.update(_read_file(file, wanted))
        for name, tensor in found.items():
            stored = self.tensors[name]
            if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
                raise LlmqError(f"{stored.file} changed while it was being read: {name} is another tensor now")
        return found


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The safetensors checkpoint in `folder`: index and headers are read and checked, tensors are not.

    Raises `LlmqError`, naming file and tensor: no such folder; no safetensors in it; a broken or truncated file; an
    index that is broken, names anything but plain files of the folder, or disagrees with its shards in any direction.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LlmqError(f"a checkpoint is a folder: {folder} is {'a file' if folder.exists() else 'not there'}")
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return Checkpoint(folder, MappingProxyType(_header(single)))
    if not index.is_file():
        raise LlmqError(_nothing_to_read(folder))
    weight_map = _weight_map(index)
    listed: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        listed.setdefault(file_name, set()).add(name)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(listed):
        header = _header(_shard(folder, file_name))
        _agree(file_name, listed[file_name], set(header), weight_map)
        tensors.update(header)
    return Checkpoint(folder, MappingProxyType(tensors))


def _nothing_to_read(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(PICKLES)]
    shards = [name for name in names if name.endswith(".safetensors")]
    start = f"{folder} has neither {SINGLE} nor {INDEX}"
    if shards:
        return f"{start}: it has {first_names(shards)}, but no index that says which tensor lies where; download it too"
    if pickles:
        why = "pickles are not read, since opening one runs the code in it; convert to safetensors"
        return f"{start}: it has {first_names(pickles)}; {why}"
    return f"{start}: give a folder that holds a model in safetensors"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        parsed = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise LlmqError(f"{index} is not readable JSON: {error}") from None
    except _Repeated as error:
        raise LlmqError(f"{index} lists {error} twice") from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise LlmqError(f"{index} must have a weight_map from tensor names to files")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise LlmqError(f"{index} sends {name} to {file_name!r}, which is not a file name")
    return weight_map


class _Repeated(Exception):
    """A key that a JSON object holds more than once."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Repeated(key)
        found[key] = value
    return found


def _shard(folder: Path, file_name: str) -> Path:
    """The file that the index means. A path, even one that ends inside the folder, is refused."""
    if file_name in ("", ".", "..") or any(sign in file_name for sign in "/\\:\0"):
        raise LlmqError(
            f"{folder / INDEX} may name files of its own folder only, without a path; it names {file_name!r}"
        )
    if not file_name.endswith(".safetensors"):
        raise LlmqError(f"{folder / INDEX} may name safetensors files only; it names {file_name!r}")
    if not (folder / file_name).is_file():
        raise LlmqError(f"{folder / INDEX} names {file_name}, which is not a file of the folder; download it again")
    return folder / file_name


def _header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. safetensors checks that offsets, shapes and the file's length agree."""
    found = {}
    try:
        with safe_open(file, framework="pt", device="cpu", backend="pread") as handle:
            for name in handle.keys():  # noqa: SIM118 (a handle is not iterable)
                view = handle.get_slice(name)
                code = view.get_dtype()
                if code not in DTYPES:
                    raise LlmqError(f"{file}: {name} has dtype {code}, which is not read")
                found[name] = StoredTensor(file, DTYPES[code], tuple(view.get_shape()))
    except (SafetensorError, OSError) as error:
        raise LlmqError(f"{file} is not a whole safetensors file: {error}; download or convert it again") from None
    return found


def _read_file(file: Path, names: list[str]) -> dict[str, Tensor]:
    try:
        # pread copies into memory that the tensor owns; the default maps the file, and a mapped page counts as ours
        # for as long as one tensor of the file lives.
        with safe_open(file, framework="pt", device="cpu", backend="pread") as handle:
            return {name: handle.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise LlmqError(f"{file} cannot be read: {error}") from None


def _agree(file_name: str, listed: set[str], held: set[str], weight_map: Mapping[str, str]) -> None:
    """Raise unless the index and the shard name the same tensors."""
    absent = sorted(listed - held)
    if absent:
        raise LlmqError(f"the index says that {file_name} holds {first_names(absent)}, and it does not")
    extra = sorted(held - listed)
    twice = [name for name in extra if name in weight_map]
    if twice:
        raise LlmqError(f"{first_names(twice)} lies in {file_name} and also in {weight_map[twice[0]]}")
    if extra:
        raise LlmqError(f"{file_name} holds {first_names(extra)}, which the index does not list")
