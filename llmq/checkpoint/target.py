"""Which folders may become the output of a run: never the source, and with overwrite only what a quantizer wrote.

Two rules, checked before any work:

    overlap      the output may not be an input, contain one, lie in one, or be the place that one links to
    replacement  `overwrite` removes the old folder, so that folder must be an empty one or a quantized checkpoint with
                 nothing else in it
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from llmq.errors import LlmqError

REPORT = "llmq_report.json"
SUBFOLDERS = ("additional_chat_templates",)
"""Folders that a checkpoint may hold."""


def refuse_overlap(target: str | Path, inputs: Iterable[Path]) -> None:
    """Raise `LlmqError` where writing to `target` would touch one of `inputs`: files and folders, or paths of none.

    Links are followed in both directions: an input is also every place that one of its files links to.
    """
    output = Path(target).absolute()
    output = output.parent.resolve() / output.name
    places = {output, output.resolve()}
    for given in inputs:
        if not given.exists():
            continue
        for place, is_folder in _places(given):
            for mine in places:
                if mine == place:
                    how = "is"
                elif mine in place.parents:
                    how = "contains"
                elif is_folder and place in mine.parents:
                    how = "lies in"
                else:
                    continue
                raise LlmqError(f"the output {target} {how} an input of this run, {given}; choose another folder")


def refuse_replacement(target: Path) -> None:
    """Raise `LlmqError` unless the folder `target` may be removed for a new checkpoint."""
    entries = list(target.iterdir())
    if not entries:
        return
    if not _is_quantized(target):
        raise LlmqError(
            f"--overwrite replaces quantized checkpoints only, and {target} holds other files: its config.json has no "
            "quantization_config; remove the folder yourself or choose another"
        )
    others = sorted(path.name for path in entries if path.is_dir() and path.name not in SUBFOLDERS)
    if others:
        raise LlmqError(
            f"--overwrite would also remove {target / others[0]}, which is no part of a checkpoint; "
            "move it or choose another folder"
        )


def _places(given: Path) -> list[tuple[Path, bool]]:
    """Where an input lies: itself, and what it and the files directly in it link to. True marks folders."""
    found = [(given.absolute(), given.is_dir()), (given.resolve(), given.is_dir())]
    if given.is_dir():
        found += [(file.resolve(), False) for file in given.iterdir() if file.is_symlink() and not file.is_dir()]
    return found


def _is_quantized(folder: Path) -> bool:
    if (folder / REPORT).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("quantization_config"), dict)
