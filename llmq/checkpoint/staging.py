"""A folder that appears complete or not at all: it is filled next to its target and renamed at the end.

    {name}                     the target: absent, or the old folder, until `publish` renames the filled folder to it
    .{name}.partial-<random>   next to the target, on the same filesystem: the folder that is being filled
    .{name}.old-<random>       exists for a moment, with overwrite: the old folder, moved aside
    .{name}.lock               an empty file that the running process keeps locked

Locking: there is one lock per target. A run takes it before anything else and keeps it until it has published or
discarded its folder. A second run for the same target is refused at once, even if both were started at the same time.
The operating system releases the lock of a killed process, so a lock file that was left over does not block later runs.
`publish` and `discard` remove the lock file; after a kill, the next run for that target does.

Recovery: while a run holds the lock, every partial folder of its target must be left from a killed run, and is removed.
A kill between the two renames of an overwrite leaves no target. The complete old folder is then still next to it, and
the next run first moves it back.

Some filesystems have no locks. There no run is refused because of another one, and partial folders are never removed,
since they may belong to a run that is still going on. Two runs for one target then conflict at the final rename only.

With overwrite only a quantized checkpoint or an empty folder is replaced (`llmq.checkpoint.target`).

Left out: exchanging the old and the new folder in one step, which the standard library cannot do.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from llmq.checkpoint.target import refuse_replacement
from llmq.errors import LlmqError

FULL = (errno.ENOSPC, errno.EDQUOT)
LOCK_ATTEMPTS = 100  # a lock file can vanish between opening and locking it only while another run ends

PARTIAL_KINDS = ("partial", "new")
"""Kinds of folders that a killed run leaves; `new` is the name that earlier versions gave to one without a lock."""


class StagedFolder:
    """The folder that will be `target`. Exactly one of `publish` and `discard` takes effect.

    Fields:
        target: the absolute path of the finished folder.
        folder: where to write now; the target itself once published.
        published: whether `publish` has renamed the folder.

    Raises `LlmqError` before anything is written if

        - the target is a file or a symlink;
        - the target exists and `overwrite` is False, or it is not a folder that may be replaced;
        - another run for the same target is still going on;
        - fewer than `needed` bytes are free.
    """

    def __init__(self, target: str | Path, needed: int, overwrite: bool = False) -> None:
        path = Path(target).absolute()
        if not path.name:
            raise LlmqError(f"the output must be a new folder; {path} is the root of a filesystem; name a folder in it")
        # The parent is resolved, so that the renames stay on one filesystem. The target itself may not be a symlink.
        self.target = path.parent.resolve() / path.name
        self._overwrite = overwrite
        self._made: list[Path] = []
        self._lock: int | None = None
        self.published = False
        _refuse_existing(self.target, overwrite)
        try:
            with writing(self.target, needed):
                self._lock = _lock(self.target, self._made)
                _recover(self.target, self._lock is not None)
                _refuse_existing(self.target, overwrite)
                _check_space(self.target, needed)
                self.folder = _beside(self.target, "partial")
                os.mkdir(self.folder)
        except BaseException:
            self._release()
            raise

    def publish(self) -> None:
        """Flush everything to the disk and rename the folder to the target; an old target is then removed."""
        aside: Path | None = None
        with writing(self.target, 0):
            for path in sorted(self.folder.rglob("*")):
                sync(path)
            sync(self.folder)
            _refuse_existing(self.target, self._overwrite)
            if self.target.exists():
                aside = _beside(self.target, "old")
                os.rename(self.target, aside)
            try:
                os.rename(self.folder, self.target)
            except BaseException:
                if aside is not None:
                    os.rename(aside, self.target)
                raise
        self.folder, self.published = self.target, True
        try:
            with writing(self.target.parent, 0):
                sync(self.target.parent)
            if aside is not None:
                _remove_old(aside, self.target)
        finally:
            _unlock(self._lock, self.target)

    def discard(self) -> None:
        """Remove what was written, and the parent folders that were made for it. Does nothing once published."""
        if self.published:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        _unlock(self._lock, self.target)
        self._lock = None
        _remove_made(self._made)


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Turn an `OSError` of the body into an `LlmqError` that names `path` and, on a full disk, says so.

    path: what is being written. needed: how many bytes it takes; 0 leaves the number out of the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            needs = f" needs {needed} bytes," if needed else ":"
            free = shutil.disk_usage(_existing(path)).free
            raise LlmqError(
                f"the disk is full: {path}{needs} {free} bytes are free; free some space or write elsewhere"
            ) from None
        raise LlmqError(
            f"{path} cannot be written: {error.strerror or error}; check its permissions or write elsewhere"
        ) from None


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk, so that they survive a power failure."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.EOPNOTSUPP)):  # some network filesystems cannot
            raise
    finally:
        os.close(handle)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        kind = "symlink" if target.is_symlink() else "file"
        raise LlmqError(f"the output must be a folder; {target} is a {kind}; choose another path")
    if not overwrite:
        raise LlmqError(f"output folder {target} already exists; choose another or pass --overwrite")
    refuse_replacement(target)


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise LlmqError(
            f"the disk is too full: {target} needs {needed} bytes, {free} bytes are free; "
            "free some space or write elsewhere"
        )


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}"


def _siblings(target: Path, kind: str) -> list[Path]:
    prefix = f".{target.name}.{kind}-"
    return sorted(path for path in target.parent.iterdir() if path.name.startswith(prefix) and path.is_dir())


def _recover(target: Path, locked: bool) -> None:
    """Clean up after killed runs for this target. locked: no other run for it can be going on."""
    for folder in (folder for kind in PARTIAL_KINDS for folder in _siblings(target, kind)):
        if locked:
            shutil.rmtree(folder, ignore_errors=True)
    for old in _siblings(target, "old"):
        if not os.path.lexists(target):
            os.rename(old, target)
        elif locked:
            shutil.rmtree(old, ignore_errors=True)


def _lock_file(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


def _lock(target: Path, made: list[Path]) -> int | None:
    """Make missing parents of `target` and take its lock.

    Returns a file descriptor that holds the lock until it is closed; None where the filesystem has no locks.
    made: the parents that were made are added, deepest first. Raises `LlmqError` if another process holds the lock.
    """
    path = _lock_file(target)
    for _ in range(LOCK_ATTEMPTS):
        made[:0] = _make_parents(target.parent)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # another run that ended has just removed the parent
            continue
        try:
            locked = lock_descriptor(handle, blocking=False)
        except OSError:  # not in use by another run: this filesystem has no locks
            os.close(handle)
            with suppress(OSError):
                path.unlink()
            return None
        if not locked:
            os.close(handle)
            break
        if _is_same_file(handle, path):
            return handle
        os.close(handle)  # the run before has removed the file at its end; a third run would not see this lock
    raise LlmqError(f"another run is writing {target}; wait for it to end or choose another folder")


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _unlock(lock: int | None, target: Path) -> None:
    """Remove the lock file and release the lock."""
    if lock is None:
        return
    # A file can be removed while it is open, except on Windows; there another run's open file cannot be removed.
    if sys.platform == "win32":
        os.close(lock)
    with suppress(OSError):
        _lock_file(target).unlink()
    if sys.platform != "win32":
        os.close(lock)


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _make_parents(parent: Path) -> list[Path]:
    """Make `parent` and the missing folders above it. Returns what was made, deepest first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        with suppress(FileNotFoundError):  # a run that ended has just removed the folder above it: the caller retries
            folder.mkdir(exist_ok=True)
    return missing


def _remove_made(made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # it holds something else by now and stays
            return


def _remove_old(aside: Path, target: Path) -> None:
    try:
        shutil.rmtree(aside)
    except OSError as error:
        raise LlmqError(
            f"{target} is written, but the folder that it replaced could not be removed: {error}; remove {aside}"
        ) from None
