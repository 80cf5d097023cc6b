"""Outputs that would delete an input, or anything that no quantizer wrote, are refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint.target import refuse_overlap, refuse_replacement
from tests.tiny import VOCAB, tiny_model

WINDOWS = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(2))
CONFIG = llmq.QuantConfig("rtn", group_size=32)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """runs/model is a source, runs/packed its quantized form; `link` links to the source, near/ holds links to its files."""
    tiny_model("llama").save_pretrained(tmp_path / "runs" / "model")
    llmq.quantize(tmp_path / "runs" / "model", tmp_path / "runs" / "packed", CONFIG)
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "model")
    (tmp_path / "near").mkdir()
    for file in (tmp_path / "runs" / "model").iterdir():
        (tmp_path / "near" / file.name).symlink_to(file)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


OVERLAPS = {
    "the source itself": ("runs/model", "runs/model", "is an input"),
    "above the source": ("runs/model", "runs", "contains an input"),
    "inside the source": ("runs/model", "runs/model/out", "is inside an input"),
    "the source through a link": ("link", "runs/model", "is an input"),
    "above the source through a link": ("link", "runs", "contains an input"),
    "a link to the source": ("runs/model", "link", "is an input"),
    "the folder that the source's files link to": ("near", "runs/model", "contains an input"),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_an_output_that_touches_the_source_is_refused(place: Path, case: str) -> None:
    source, output, message = OVERLAPS[case]
    (place / "runs" / "config.json").write_text(json.dumps({"quantization_config": {}}))  # looks like a checkpoint
    before = contents(place)
    with pytest.raises(llmq.LlmqError, match=message):
        llmq.quantize(place / source, place / output, CONFIG, overwrite=True)
    assert contents(place) == before


def test_the_folder_of_a_loaded_model_is_an_input(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "runs" / "model")
    with pytest.raises(llmq.LlmqError, match="is an input"):
        llmq.quantize(model, place / "runs" / "model", CONFIG, overwrite=True)


def test_the_calibration_text_is_an_input(place: Path) -> None:
    text = place / "runs" / "packed" / "text.txt"
    text.write_text("word " * 100)
    with pytest.raises(llmq.LlmqError, match="contains an input"):
        llmq.quantize(
            place / "runs" / "model",
            text.parent,
            llmq.QuantConfig("gptq", group_size=32),
            llmq.Calibration(str(text), 1, 16),
            overwrite=True,
        )
    assert text.exists()


def test_a_folder_next_to_the_source_and_a_hub_id_are_accepted(place: Path) -> None:
    refuse_overlap(place / "runs" / "other", [place / "runs" / "model", Path("owner/name")])
    refuse_overlap("owner/name", [Path("owner/name")])  # a hub id that is also the name of the output
    llmq.quantize(place / "runs" / "model", place / "runs" / "packed", CONFIG, overwrite=True)


def _dense(folder: Path) -> None:
    (folder / "llmq_report.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


UNKNOWN = "holds files, and no config.json with a quantization_config"
REPLACEMENTS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a checkpoint of llmq": (lambda folder: None, None),
    "a checkpoint of another quantizer": (lambda folder: (folder / "llmq_report.json").unlink(), None),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), None),
    "a dense model": (_dense, UNKNOWN),
    "any other folder": (
        lambda folder: [file.unlink() for file in folder.glob("*.json")],
        UNKNOWN,
    ),
    "a broken config": (
        lambda folder: [(folder / "llmq_report.json").unlink(), (folder / "config.json").write_text("{")],
        UNKNOWN,
    ),
    "a checkpoint with a folder inside": (lambda folder: (folder / "mine").mkdir(), "would also delete"),
}


@pytest.mark.parametrize("case", REPLACEMENTS)
def test_overwrite_replaces_only_what_a_quantizer_wrote(place: Path, case: str) -> None:
    change, message = REPLACEMENTS[case]
    target = place / "runs" / "packed"
    change(target)
    if message is None:
        refuse_replacement(target)
        return
    before = contents(place)
    with pytest.raises(llmq.LlmqError, match=message):
        llmq.quantize(place / "runs" / "model", target, CONFIG, overwrite=True)
    assert contents(place) == before
