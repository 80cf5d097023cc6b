"""The reader returns what safetensors' own loader returns, and names the file of every malformed checkpoint."""

from __future__ import annotations

import gc
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint.reader import INDEX, SINGLE, open_checkpoint
from llmq.errors import LlmqError


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7, generator=generator).bfloat16(),
        "a.bias": torch.randn(5, generator=generator),
        "b.packed": torch.randint(-9, 9, (3, 2), generator=generator, dtype=torch.int32),
        "b.shape": torch.tensor([3, 16]),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
    }


def write_sharded(folder: Path) -> dict[str, Tensor]:
    """Two shards and an index; returns all tensors."""
    tensors = some_tensors()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, weight_map)
    return tensors


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map_of(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_safetensors_reads(tmp_path: Path, sharded: bool) -> None:
    if sharded:
        tensors = write_sharded(tmp_path)
    else:
        tensors = some_tensors()
        save_file(tensors, tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, stored in checkpoint.tensors.items():
        assert (stored.dtype, stored.shape, stored.nbytes) == (
            tensors[name].dtype,
            tuple(tensors[name].shape),
            tensors[name].nbytes,
        )
    loaded = checkpoint.read(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert set(checkpoint.read(["scalar", "a.bias"])) == {"scalar", "a.bias"}
    assert checkpoint.read([]) == {}


def test_returned_tensors_own_their_memory(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    loaded = checkpoint.read(["a.weight"])
    assert loaded["a.weight"].untyped_storage().nbytes() == loaded["a.weight"].nbytes
    loaded["a.weight"].zero_()
    assert torch.equal(load_file(tmp_path / SINGLE)["a.weight"], some_tensors()["a.weight"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_file_stays_open_or_mapped(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tensors = checkpoint.read(checkpoint.tensors)
    gc.collect()
    assert tensors
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    open_files = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    assert not any(path.startswith(str(tmp_path)) for path in open_files)


def test_a_snapshot_of_symlinks_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    tensors = write_sharded(blobs)
    for file in sorted(blobs.iterdir()):
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert torch.equal(open_checkpoint(snapshot).read(["a.bias"])["a.bias"], tensors["a.bias"])


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"only": torch.ones(2)}, tmp_path / SINGLE)
    assert set(open_checkpoint(tmp_path).tensors) == {"only"}


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(LlmqError) as caught:
        open_checkpoint(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "a file")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_by_name(tmp_path: Path, pickle: str) -> None:
    (tmp_path / pickle).write_bytes(b"\x80\x04.")
    refused(tmp_path, pickle, "pickles are not read", "convert to safetensors")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), SINGLE)
    save_file(some_tensors(), tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path, "model-00001-of-00002.safetensors", "no index")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "./model-00001-of-00002.safetensors",
        "..",
        "",
        ".\\x.safetensors",
    ],
)
def test_paths_in_the_index_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    write_sharded(folder)
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    save_file({"x": torch.ones(1)}, folder / "sub" / "inside.safetensors")
    write_index(folder, weight_map_of(folder) | {"x": name})
    refused(folder, "without a path", repr(name))


def test_absolute_paths_in_the_index_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, weight_map_of(tmp_path) | {"x": str(tmp_path / "model-00001-of-00002.safetensors")})
    refused(tmp_path, "without a path")


def test_other_files_in_the_index_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    write_index(tmp_path, weight_map_of(tmp_path) | {"x": "pytorch_model.bin"})
    refused(tmp_path, "pytorch_model.bin", "safetensors files only")


def test_a_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").mkdir()
    refused(tmp_path, "model-00002-of-00002.safetensors")


def test_the_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    weight_map = weight_map_of(tmp_path)
    write_index(tmp_path, weight_map | {"ghost": "model-00001-of-00002.safetensors"})
    refused(tmp_path, "ghost", "model-00001-of-00002.safetensors")
    write_index(tmp_path, {name: file for name, file in weight_map.items() if name != "scalar"})
    refused(tmp_path, "scalar", "does not list")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    first = "model-00001-of-00002.safetensors"
    save_file({name: tensors[name] for name in ("a.weight", "a.bias", "b.packed", "scalar")}, tmp_path / first)
    refused(tmp_path, "scalar", first, "also in")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(tmp_path, INDEX)


def test_an_index_that_repeats_a_name(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    text = (tmp_path / INDEX).read_text().replace('"weight_map": {', '"weight_map": {"scalar": "x.safetensors", ')
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, "scalar", "twice")


def broken_files() -> dict[str, bytes]:
    whole = struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64) + bytes(8)
    return {
        "empty": b"",
        "short": whole[:5],
        "header cut": whole[:40],
        "data cut": whole[:-1],
        "byte too many": whole + b"\0",
        "huge header": struct.pack("<Q", 1 << 40) + whole[8:],
        "no json": whole.replace(b'{"a"', b'x"a"'),
        "offsets": whole.replace(b"[0,8]", b"[0,4]"),
        "unknown dtype": whole.replace(b"F32", b"F99"),
        "negative shape": whole.replace(b"[2]", b"-[2"),
        "pickle": b"\x80\x04\x95" + bytes(40),
    }


@pytest.mark.parametrize("kind", list(broken_files()))
def test_a_broken_file_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / SINGLE).write_bytes(broken_files()[kind])
    refused(tmp_path, str(tmp_path / SINGLE))


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for end in range(0, len(whole), 13):
        (tmp_path / SINGLE).write_bytes(whole[:end])
        refused(tmp_path, SINGLE)


def test_a_dtype_that_torch_cannot_read(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'.ljust(64)
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 64) + header + bytes(1))
    refused(tmp_path, "a", "F4")


def test_read_refuses_other_names_and_changed_files(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(LlmqError, match="no tensor ghost"):
        checkpoint.read(["ghost"])
    save_file({"scalar": torch.ones(2)}, tmp_path / SINGLE)
    with pytest.raises(LlmqError, match="changed"):
        checkpoint.read(["scalar"])
    with pytest.raises(LlmqError, match=SINGLE):
        checkpoint.read(["a.bias"])
    (tmp_path / SINGLE).unlink()
    with pytest.raises(LlmqError, match=SINGLE):
        checkpoint.read(["scalar"])
