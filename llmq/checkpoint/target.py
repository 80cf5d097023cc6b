"""Which folders may become the output of a run. Two rules are checked before any work:

overlap      The output may not be an input, contain one, be inside one, or be the place that one links to.
replacement  With `overwrite` the old folder is deleted, so it must be empty or a quantized checkpoint with nothing
             else in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from llmq.errors import LlmqError

REPORT = "llmq_report.json"
SUBFOLDERS = ("additional_chat_templates",)
"""Folders that a checkpoint may contain."""


def refuse_overlap(target: str | Path, inputs: Iterable[Path]) -> None:
    """Raise `LlmqError` if writing to `target` would touch one of `inputs`.

    inputs: paths of files and folders; paths that do not exist are ignored.
    Links are followed on both sides: every place that a file of an input links to counts as the input.
    """
    path = Path(target).absolute()
    path = path.parent.resolve() / path.name
    for source in inputs:
        if not source.exists():
            continue
        for place, is_folder in _places(source):
            for output in {path, path.resolve()}:
                if output == place:
                    relation = "is"
                elif output in place.parents:
                    relation = "contains"
                elif is_folder and place in output.parents:
                    relation = "is inside"
                else:
                    continue
                raise LlmqError(f"the output {target} {relation} an input of this run, {source}; choose another folder")


def refuse_replacement(target: Path) -> None:
    """Raise `LlmqError` unless the folder `target` may be deleted for a new checkpoint."""
    entries = list(target.iterdir())
    if not entries:
        return
    if not _is_quantized(target):
        raise LlmqError(
            f"--overwrite replaces quantized checkpoints only; {target} holds files, and no config.json with a "
            "quantization_config; delete the folder yourself or choose another"
        )
    others = sorted(path.name for path in entries if path.is_dir() and path.name not in SUBFOLDERS)
    if others:
        raise LlmqError(
            f"--overwrite would also delete {target / others[0]}, which is not part of a checkpoint; "
            "move it or choose another folder"
        )


def _places(source: Path) -> list[tuple[Path, bool]]:
    """The paths of an input, and whether each is a folder: its own, and those that it or files directly in it link to."""
    places = [(source.absolute(), source.is_dir()), (source.resolve(), source.is_dir())]
    if source.is_dir():
        places += [(file.resolve(), False) for file in source.iterdir() if file.is_symlink() and not file.is_dir()]
    return places


def _is_quantized(folder: Path) -> bool:
    if (folder / REPORT).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("quantization_config"), dict)
