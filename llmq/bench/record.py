"""What stands beside every measured figure: device, versions, command, date, seed; and files that are whole or not there."""

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
    """The head of a record. command: the script's name and its arguments. self_test: nothing in it is a measurement."""
    known = wna16.device_of(device)
    found: dict[str, Any] = {"device": name_of(device), "arch": known.arch, "processors": known.processors}
    found |= {"cache_bytes": cache_bytes(device), "memory_bytes": _memory(device)}
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    versions |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "torch_commit": torch.version.git_version}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found |= {"versions": versions, "system": f"{platform.system()} {platform.machine()}"}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    # A folder's place says nothing of the measurement, and records are published.
    said = " ".join(Path(part).name if Path(part).is_absolute() else part for part in command)
    found |= {"command": said, "date": date, "seed": seed, "self_test": self_test}
    return found | {"measured": f"{date}, {told}, {said}" + (", self-test: no measurement" if self_test else "")}


def measured_device(self_test: bool) -> torch.device:
    """The current GPU; in a self-test the CPU. `LlmqError` where there is no GPU to measure."""
    if self_test:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LlmqError("torch finds no GPU here: run it on one, or try the code with --self-test")
    return torch.device("cuda", torch.cuda.current_device())


def name_of(device: torch.device) -> str:
    """The device's name as its driver tells it; `cpu` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def slug(name: str) -> str:
    """A name as part of a file's: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def writable(folder: Path) -> Path:
    """The folder, made where it is absent: asked before hours are measured. `LlmqError` where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LlmqError(f"--output {folder} cannot be written to: {error.strerror}") from None
    return folder


def write(path: Path, values: dict[str, Any]) -> None:
    """One JSON file, through a staged one, so that a run that is stopped leaves the last one."""
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
