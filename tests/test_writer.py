"""The writer produces safetensors' own bytes in any order; a target is absent, old or complete, never in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint import staging
from llmq.checkpoint.reader import DTYPES, INDEX, SINGLE, open_checkpoint
from llmq.checkpoint.writer import StagedCheckpoint, plan_shards
from llmq.errors import LlmqError
from llmq.formats.base import TensorSpec

OLD = json.dumps({"quantization_config": {}})

posix = pytest.mark.skipif(sys.platform == "win32", reason="forks and kills processes")


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bit pattern of `dtype` (0 and 1 for bool)."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    shapes: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("embed", torch.bfloat16, (40, 8)),
        ("a.weight_packed", torch.int32, (16, 4)),
        ("a.weight_scale", torch.bfloat16, (16, 1)),
        ("a.weight_shape", torch.int64, (2,)),
        ("a.bias", torch.float32, (3,)),
        ("flag", torch.bool, ()),
        ("nothing", torch.float16, (0, 3)),
    ]
    return {name: random_bytes(dtype, shape, seed + i) for i, (name, dtype, shape) in enumerate(shapes)}


def write(
    target: Path,
    tensors: dict[str, Tensor],
    size: int | str = "5GB",
    overwrite: bool = False,
    before_commit: Callable[[], object] = lambda: None,
) -> None:
    with StagedCheckpoint(target, specs_of(tensors), size, overwrite) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)
        before_commit()
        out.commit()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


ENTRIES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(entries=ENTRIES, seed=st.integers(0, 99), size=st.integers(1, 200), data=st.data())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any], seed: int, size: int, data: st.DataObject
) -> None:
    target = tmp_path_factory.mktemp("round") / "out"
    tensors = {name: random_bytes(dtype, shape, seed + i) for i, (name, (dtype, shape)) in enumerate(entries.items())}
    order = data.draw(st.permutations(list(tensors)))
    with StagedCheckpoint(target, specs_of(tensors), size) as out:
        for name in order:
            out.write(name, tensors[name])
        out.commit()
    files = sorted(target.glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(stored) == set(tensors)
    assert all(same_bytes(stored[name], tensor) for name, tensor in tensors.items())
    for file in files:
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            in_file = {name: tensors[name] for name in handle.keys()}  # noqa: SIM118
        save_file(in_file, target / "theirs", metadata={"format": "pt"})
        assert file.read_bytes() == (target / "theirs").read_bytes()


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write(tmp_path / "out", some_tensors())
    assert names_in(tmp_path / "out") == [SINGLE]
    assert names_in(tmp_path) == ["out"]


def test_several_shards_and_their_index(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "out", tensors, size=300)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert set(index["weight_map"]) == set(tensors)
    shards = plan_shards(specs_of(tensors), 300)
    assert sorted(shard.file for shard in shards) == sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0].file == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        assert (tmp_path / "out" / shard.file).stat().st_size == shard.nbytes


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, some_tensors(), size=300)
    for file in names_in(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_values_are_taken_from_views_and_gradients(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "p": torch.nn.Parameter(base), "s": base[:, 1]}
    write(tmp_path / "out", tensors)
    stored = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_side_files_are_kept_and_parents_made(tmp_path: Path) -> None:
    tensors, target = some_tensors(), tmp_path / "new" / "deep" / "out"
    with StagedCheckpoint(target, specs_of(tensors)) as out:
        assert out.folder.parent == target.parent
        assert not target.exists()
        (out.folder / "config.json").write_text("{}")
        for name, tensor in tensors.items():
            out.write(name, tensor)
        out.commit()
        assert out.folder == target
    assert names_in(target) == ["config.json", SINGLE]


@pytest.mark.parametrize("size", ["", "5XB", "x5GB", 0, -1, "0GB", "-3GB"])
def test_a_bad_shard_size(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(LlmqError, match="max_shard_size"):
        StagedCheckpoint(tmp_path / "out", specs_of(some_tensors()), size)
    assert names_in(tmp_path) == []


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(LlmqError, match="at least one tensor"):
        StagedCheckpoint(tmp_path / "out", {})
    with pytest.raises(LlmqError, match="complex32"):
        StagedCheckpoint(tmp_path / "out", {"a": TensorSpec(torch.complex32, (2,))})


def test_tensors_that_are_not_planned_are_refused(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2, 3))}
    with StagedCheckpoint(tmp_path / "out", specs) as out:
        with pytest.raises(LlmqError, match="b is not part"):
            out.write("b", torch.ones(2, 3))
        with pytest.raises(LlmqError, match=r"a was planned as torch.float32 \[2, 3\]; got torch.float32 \[3, 2\]"):
            out.write("a", torch.ones(3, 2))
        with pytest.raises(LlmqError, match="float64"):
            out.write("a", torch.ones(2, 3, dtype=torch.float64))
        with pytest.raises(LlmqError, match="the first is a"):
            out.commit()
        out.write("a", torch.ones(2, 3))
        with pytest.raises(LlmqError, match="twice"):
            out.write("a", torch.ones(2, 3))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(error):
        write(tmp_path / "deep" / "out", some_tensors(), before_commit=stop)
    assert names_in(tmp_path) == []


def old_checkpoint(target: Path) -> dict[str, Tensor]:
    old = some_tensors(seed=50)
    write(target, old, size=300)
    (target / "config.json").write_text(OLD)
    return old


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(LlmqError, match="--overwrite"):
        StagedCheckpoint(tmp_path / "out", specs_of(some_tensors()))
    assert snapshot(tmp_path / "out") == before
    assert names_in(tmp_path) == ["out"]


def test_overwrite_keeps_the_old_checkpoint_until_the_end(tmp_path: Path) -> None:
    target, new = tmp_path / "out", some_tensors()
    old_checkpoint(target)
    before = snapshot(target)
    with StagedCheckpoint(target, specs_of(new), overwrite=True) as out:
        for name, tensor in new.items():
            out.write(name, tensor)
            assert snapshot(target) == before
        out.commit()
    assert names_in(target) == [SINGLE]
    assert names_in(tmp_path) == ["out"]
    assert torch.equal(load_file(target / SINGLE)["a.weight_packed"], new["a.weight_packed"])


def test_a_failed_overwrite_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    old_checkpoint(target)
    before, rename, calls = snapshot(target), os.rename, []

    def failing(source: Path, destination: Path) -> None:
        calls.append(source)
        if Path(destination) == target and len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, destination)

    def sabotage() -> None:
        monkeypatch.setattr(os, "rename", failing)

    with pytest.raises(KeyboardInterrupt):
        write(target, some_tensors(), overwrite=True, before_commit=sabotage)
    assert snapshot(target) == before
    assert names_in(tmp_path) == ["out"]


def test_overwrite_replaces_checkpoints_only(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    write(target, some_tensors(), overwrite=True)  # an empty folder may be replaced
    (target / "thesis.tex").write_text("")
    with pytest.raises(LlmqError, match=r"replaces quantized checkpoints only"):
        write(target, some_tensors(), overwrite=True)
    assert (target / "thesis.tex").exists()


def test_a_target_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, word in (("file", "is a file"), ("link", "is a symlink"), ("file/out", "cannot be written")):
        with pytest.raises(LlmqError, match=word):
            StagedCheckpoint(tmp_path / name, specs_of(some_tensors()), overwrite=True)
    with pytest.raises(LlmqError, match="root of a filesystem"):
        StagedCheckpoint("/", specs_of(some_tensors()))
    assert names_in(tmp_path) == ["file", "link"]


def test_a_target_that_appears_during_the_run_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def appear() -> None:
        target.mkdir()
        (target / "theirs").write_text("")

    with pytest.raises(LlmqError, match="already exists"):
        write(target, some_tensors(), before_commit=appear)
    assert names_in(target) == ["theirs"]
    assert names_in(tmp_path) == ["out"]


def test_a_shard_damaged_before_commit_is_detected(tmp_path: Path) -> None:
    def damage() -> None:
        (shard,) = tmp_path.glob(f"*/{SINGLE}")
        os.truncate(shard, 100)

    with pytest.raises(LlmqError, match=SINGLE):
        write(tmp_path / "out", some_tensors(), before_commit=damage)
    assert names_in(tmp_path) == []


@posix
def test_two_runs_for_one_target(tmp_path: Path) -> None:
    tensors = some_tensors()
    with StagedCheckpoint(tmp_path / "out", specs_of(tensors)) as out:
        with pytest.raises(LlmqError, match="another run"):
            StagedCheckpoint(tmp_path / "out", specs_of(tensors))
        write(tmp_path / "other", tensors)
        for name, tensor in tensors.items():
            out.write(name, tensor)
        out.commit()
    assert names_in(tmp_path) == ["other", "out"]


def test_a_full_disk_is_detected_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(staging.shutil.disk_usage(tmp_path))(1000, 900, 100)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LlmqError, match=r"needs \d+ bytes, 100 bytes are free"):
        StagedCheckpoint(tmp_path / "new" / "out", specs_of(some_tensors()))
    assert names_in(tmp_path) == []


def test_a_side_file_that_does_not_fit(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "config.json")

    with pytest.raises(LlmqError, match="disk is full"):
        write(tmp_path / "out", some_tensors(), before_commit=fail)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_during_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    if not hasattr(os, call):
        pytest.skip(f"no os.{call}")
    old_checkpoint(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(LlmqError) as caught:
        write(tmp_path / "out", some_tensors(), overwrite=True)
    monkeypatch.undo()
    assert str(tmp_path) in str(caught.value)
    assert ("disk is full" in str(caught.value)) == (code == errno.ENOSPC)
    assert snapshot(tmp_path / "out") == before
    assert names_in(tmp_path) == ["out"]


RUN = """
    import sys, time, torch
    from pathlib import Path
    from llmq.checkpoint.writer import StagedCheckpoint
    from llmq.formats.base import TensorSpec
    specs = {str(i): TensorSpec(torch.float32, (1000,)) for i in range(100)}
    with StagedCheckpoint(Path(sys.argv[1]), specs, overwrite=True) as out:
        for name in specs:
            out.write(name, torch.ones(1000))
            print(name, flush=True)
            time.sleep(0.005)
"""


@posix
@pytest.mark.parametrize("with_old", [False, True])
def test_kill_9_leaves_the_target_untouched(tmp_path: Path, with_old: bool) -> None:
    target = tmp_path / "out"
    if with_old:
        old_checkpoint(target)
    before = snapshot(target) if with_old else None
    root = Path(__file__).resolve().parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), str(target)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    for _ in range(10):
        assert child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert (snapshot(target) if target.exists() else None) == before
    lock, partial = [name for name in names_in(tmp_path) if name != "out"]
    assert lock == ".out.lock"
    assert partial.startswith(".out.partial-")
    write(target, some_tensors(), overwrite=True)
    assert names_in(tmp_path) == ["out"]
    assert set(open_checkpoint(target).tensors) == set(some_tensors())


def forked(run: Callable[[], object]) -> int:
    """Run a function in a copy of this process. Returns its id; `ended` waits for it."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run()
        code = 0
    except LlmqError as error:
        code = 2 if "another run is writing" in str(error) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code: 0 done, 2 refused because of another run, 1 any other error, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int) -> Callable[[], None]:
    """A function that arranges for the process to be killed when the line of `staging` with this number is reached."""

    def start() -> None:
        count = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            if frame.f_code.co_filename != staging.__file__:
                return None
            if event == "line":
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)

    return start


def write_whole(target: Path) -> None:
    """A checkpoint that may be overwritten again."""
    with StagedCheckpoint(target, {"a": TensorSpec(torch.float32, (3,))}, overwrite=True) as out:
        (out.folder / "config.json").write_text(OLD)
        out.write("a", torch.ones(3))
        out.commit()


@posix
@pytest.mark.parametrize("with_old", [False, True])
def test_a_kill_at_any_line_is_repaired_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_old: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a killed process loses nothing that it has written
    write_whole(tmp_path / "new")
    new = snapshot(tmp_path / "new")
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        target = folder / "out"
        old = None
        if with_old:
            write(target, {"b": torch.ones(2)})
            (target / "config.json").write_text(OLD)
            old = snapshot(target)
        start = killed_at(step)

        code = ended(forked(lambda: (start(), write_whole(target))))  # noqa: B023
        kept = [target] if target.exists() else list(folder.glob(".out.old-*"))
        assert len(kept) == 1 or (not kept and not with_old)
        assert all(snapshot(each) in (old, new) for each in kept)
        if code == 0:
            assert names_in(folder) == ["out"]
        write_whole(target)
        assert names_in(folder) == ["out"]
        assert snapshot(target) == new
        shutil.rmtree(folder)
    assert code == 0
    assert step > 50


@posix
def test_of_two_runs_started_together_one_is_refused_at_once(tmp_path: Path) -> None:
    target, tensors = tmp_path / "new" / "out", {"a": torch.ones(3)}

    def run(go: int, done: int) -> None:
        os.read(go, 1)
        write(target, tensors, overwrite=True, before_commit=lambda: os.read(done, 1))

    for _ in range(20):
        (go, start), (done, finish) = os.pipe(), os.pipe()
        children = [forked(lambda: run(go, done)) for _ in range(2)]  # noqa: B023
        os.write(start, b"..")
        first, status = os.wait()  # the other one waits for `finish`: this one was refused meanwhile
        assert os.waitstatus_to_exitcode(status) == 2
        os.write(finish, b".")
        assert ended(next(child for child in children if child != first)) == 0
        assert names_in(tmp_path / "new") == ["out"]
        for handle in (go, start, done, finish):
            os.close(handle)
        shutil.rmtree(tmp_path / "new")


@posix
def test_runs_that_follow_one_another_closely_never_overlap(tmp_path: Path) -> None:
    """Lock file and parent folder are removed while other runs open them. That must look like a lock that is held."""
    target, inside = tmp_path / "new" / "out", tmp_path / "inside"

    def alone() -> None:
        os.mkdir(inside)
        os.rmdir(inside)

    def run() -> None:
        for _ in range(60):
            try:
                staged = staging.StagedFolder(target, 0, overwrite=True)
            except LlmqError as error:
                if "another run is writing" not in str(error):
                    raise
            else:
                alone()
                staged.discard()

    children = [forked(run) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert [path for path in tmp_path.rglob("*") if path != target.parent] == []


@posix
def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before removes its lock file after the next one has opened it."""
    lock, opened = staging.lock_descriptor, []

    def vanishing(handle: int, *, blocking: bool) -> bool:
        if not opened:
            (tmp_path / ".out.lock").unlink()
        opened.append(handle)
        return lock(handle, blocking=blocking)

    monkeypatch.setattr(staging, "lock_descriptor", vanishing)
    staged = staging.StagedFolder(tmp_path / "out", 0)
    assert len(opened) == 2
    with pytest.raises(LlmqError, match="another run is writing"):
        staging.StagedFolder(tmp_path / "out", 0)
    staged.discard()
    assert names_in(tmp_path) == []


@posix
def test_an_unlocked_lock_file_and_folders_of_killed_runs_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / ".out.lock").touch()
    for name in (".out.partial-12345678", ".out.new-12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SINGLE).touch()
    (tmp_path / ".outer.partial-12345678").mkdir()
    write(target, some_tensors())
    assert names_in(tmp_path) == [".outer.partial-12345678", "out"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_no_run_is_refused_and_nothing_of_another_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(staging, "lock_descriptor", fail)
    target, tensors = tmp_path / "out", some_tensors()
    (tmp_path / ".out.partial-12345678").mkdir()
    with StagedCheckpoint(target, specs_of(tensors)) as out:
        write(target, tensors)
        for name, tensor in tensors.items():
            out.write(name, tensor)
        with pytest.raises(LlmqError, match="already exists"):
            out.commit()
    assert names_in(tmp_path) == [".out.partial-12345678", "out"]
    target.rename(tmp_path / ".out.old-12345678")
    with pytest.raises(LlmqError, match="already exists"):
        write(target, tensors)
    assert names_in(tmp_path) == [".out.partial-12345678", "out"]


@posix
def test_a_lock_is_given_up_even_if_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(aside: Path) -> None:
        raise PermissionError(errno.EACCES, "no", str(aside))

    target = tmp_path / "out"
    old_checkpoint(target)
    with monkeypatch.context() as patched:
        patched.setattr(staging.shutil, "rmtree", fail)
        with pytest.raises(LlmqError, match=r"is written, but the folder that it replaced could not be removed"):
            write(target, some_tensors(), overwrite=True)
    old_checkpoint(tmp_path / "other")
    (target / "config.json").write_text(OLD)
    write(target, some_tensors(), overwrite=True)
    assert names_in(tmp_path) == ["other", "out"]


@posix
def test_a_kill_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    target = tmp_path / "out"
    old_checkpoint(target)
    before = snapshot(target)
    target.rename(tmp_path / ".out.old-12345678")
    with pytest.raises(LlmqError, match="already exists"):
        write(target, some_tensors())
    assert snapshot(target) == before
    assert names_in(tmp_path) == ["out"]
