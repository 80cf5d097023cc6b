"""The circumstances recorded with every measurement (device, versions, command, date, seed), and atomic writes of JSON files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmq.bench.kernels.timing import cache_bytes
from llmq.errors import LlmqError
from llmq.kernels import wna16

PACKAGES = ("torch", "triton", "gemlite")


def about(device: torch.device, command: Sequence[str], seed: int, self_test: bool) -> dict[str, Any]:
    """The head of a record. command: the script's name and its arguments. self_test: nothing in the record is a measurement."""
    known = wna16.device_of(device)
    head: dict[str, Any] = {"device": name_of(device), "arch": known.arch, "processors": known.processors}
    head |= {"cache_bytes": cache_bytes(device), "memory_bytes": _memory(device)}
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    versions |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "torch_commit": torch.version.git_version}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    head |= {"versions": versions, "system": f"{platform.system()} {platform.machine()}"}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    # Records are published: keep only the names of absolute paths.
    line = " ".join(Path(part).name if Path(part).is_absolute() else part for part in command)
    head |= {"command": line, "date": date, "seed": seed, "self_test": self_test}
    note = ", self-test: not a measurement" if self_test else ""
    return head | {"measured": f"{date}, {packages}, {line}{note}"}


def measured_device(self_test: bool) -> torch.device:
    """The current GPU; the CPU in a self-test. Raises `LlmqError` if there is no GPU."""
    if self_test:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LlmqError("torch finds no GPU; run this on one, or use --self-test to try the code on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


def name_of(device: torch.device) -> str:
    """The driver's name of the device; `cpu` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def slug(name: str) -> str:
    """A name as part of a file name: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def writable(folder: Path) -> Path:
    """Make the folder if necessary and check that it is writable, before any measurement. Raises `LlmqError` if it is not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LlmqError(f"--output {folder} is not writable: {error.strerror}") from None
    return folder


def write(path: Path, values: dict[str, Any]) -> None:
    """Write one JSON file atomically: an interrupted run leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps(values, indent=1) + "\n")
    staged.replace(path)


def _memory(device: torch.device) -> int | None:
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
