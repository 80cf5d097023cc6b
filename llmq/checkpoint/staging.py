"""A folder that appears whole or not at all: filled beside its target, renamed to it at the end.

    .{name}.partial-<random>   beside the target, on its filesystem: what is being filled; locked by its writer
    {name}                     the target: absent, or the old folder, until `publish` renames the filled one to it
    .{name}.old-<random>       for a moment, with overwrite: the old folder, moved aside

`discard` removes what was filled. A killed process cannot call it: what it leaves is known by its lock being free,
and is removed by the next run with the same target. A lock that is held means that another run is writing there, and
this one is refused. With overwrite only a quantized checkpoint, or an empty folder, is ever replaced (`target`).

Left out: exchanging old and new in one step, which the standard library cannot do. A kill between the two renames
leaves no target; the old folder then lies whole beside it, and the next run moves it back first. Without `fcntl`
(Windows) there are no locks: leftovers are then never removed, and no run is refused for another's sake.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmq.checkpoint.target import refuse_replacement
from llmq.errors import LlmqError

if sys.platform != "win32":
    import fcntl

FULL = (errno.ENOSPC, errno.EDQUOT)


class StagedFolder:
    """The folder that will be `target`. folder: where to write now. needed: bytes that are going to be written.

    Raises `LlmqError` before anything is written: a target that is a file; one that exists, without `overwrite`; one
    that a quantizer did not write, with it; a run for the same target that is still going on; too little free space.
    """

    def __init__(self, target: str | Path, needed: int, overwrite: bool = False) -> None:
        path = Path(target).absolute()
        if not path.name:
            raise LlmqError(f"{path} cannot be an output folder; name a new one")
        # The parent is resolved, so that the renames stay on one filesystem; the target itself may not be a symlink.
        self.target = path.parent.resolve() / path.name
        self._overwrite = overwrite
        _refuse(self.target, overwrite)
        with writing(self.target, needed):
            self._made = _make_parents(self.target.parent)
        try:
            with writing(self.target, needed):
                _recover(self.target)
                _refuse(self.target, overwrite)
                _check_space(self.target, needed)
                self.folder, self._lock = _claim_new(self.target)
        except BaseException:
            _remove_made(self._made)
            raise
        self.published = False

    def publish(self) -> None:
        """Make everything durable and rename the folder to the target; an old target is then removed."""
        aside: Path | None = None
        with writing(self.target, 0):
            for path in sorted(self.folder.rglob("*")):
                sync(path)
            sync(self.folder)
            _refuse(self.target, self._overwrite)
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
        with writing(self.target.parent, 0):
            sync(self.target.parent)
        _unlock(self._lock)
        if aside is not None:
            _remove_old(aside, self.target)

    def discard(self) -> None:
        """Remove what was written, and the parent folders that were made for it. Does nothing once published."""
        if self.published:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        _unlock(self._lock)
        _remove_made(self._made)


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """While open, an `OSError` becomes an `LlmqError` that says what could not be written and, on a full disk, why."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            needs = f" needs {needed} bytes," if needed else ":"
            free = shutil.disk_usage(_existing(path)).free
            raise LlmqError(
                f"the disk is full: {path}{needs} {free} bytes are free; free some space or write elsewhere"
            ) from None
        raise LlmqError(f"{path} cannot be written: {error.strerror or error}") from None


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power failure."""
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


def _refuse(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise LlmqError(f"the output must be a folder: {target} is a {'symlink' if target.is_symlink() else 'file'}")
    if not overwrite:
        raise LlmqError(f"the output must not exist yet: {target} does; name another folder or use --overwrite")
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


def _claim_new(target: Path) -> tuple[Path, int | None]:
    """A new locked folder beside the target. It gets its name once locked: an unlocked one counts as left over."""
    unlocked, folder = _beside(target, "new"), _beside(target, "partial")
    os.mkdir(unlocked)
    lock = _lock(unlocked)
    os.rename(unlocked, folder)
    return folder, lock


def _recover(target: Path) -> None:
    """Clear away what killed runs for this target left; refuse where a run is still going on."""
    for folder in _siblings(target, "partial"):
        lock = _lock(folder)
        if lock is None:
            raise LlmqError(
                f"another run is writing {target} (in {folder.name}); wait for it; if there is none, remove that folder"
            )
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)
    for old in _siblings(target, "old"):
        if os.path.lexists(target):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


def _lock(folder: Path) -> int | None:
    """A handle that holds the lock on `folder`; None where another process holds it, or there are no locks."""
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a filesystem without locks
        os.close(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _make_parents(parent: Path) -> list[Path]:
    """Make `parent` and what is missing above it; returns what was made, deepest first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
    return missing


def _remove_made(made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # something else lies in it by now: it stays
            return


def _remove_old(aside: Path, target: Path) -> None:
    try:
        shutil.rmtree(aside)
    except OSError as error:
        raise LlmqError(
            f"{target} is written, but what it replaced could not be removed: {error}; see {aside}"
        ) from None
