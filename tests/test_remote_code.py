"""Code in a checkpoint runs only if the caller passes trust_remote_code=True; nothing is read from stdin."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmq
from llmq.evaluation import evaluate, generate_text
from tests.tiny import tiny_model

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaForCausalLM as Model
"""


@pytest.fixture
def trap(tmp_path: Path) -> tuple[Path, Path]:
    """A packed checkpoint whose config refers to its own code, and the file that this code would write."""
    folder, marker = tmp_path / "trap", tmp_path / "marker"
    llmq.quantize(tiny_model("llama"), folder, llmq.QuantConfig("rtn", group_size=32))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    auto = dict.fromkeys(("AutoModelForCausalLM", "AutoModel"), "own.Model")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit", "auto_map": auto}))
    return folder, marker


CALLS: dict[str, Callable[[Path], Any]] = {
    "load": llmq.load,
    "quantize": lambda path: llmq.quantize(path, path.with_name("out"), llmq.QuantConfig("rtn")),
    "preview": lambda path: llmq.preview(path, llmq.QuantConfig("rtn")),
    "generate": lambda path: generate_text(path, "hello"),
    "evaluate": lambda path: evaluate([("trap", path)], window=16),
}


@pytest.mark.parametrize("call", CALLS)
def test_code_in_a_checkpoint_is_not_run(trap: tuple[Path, Path], call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, marker = trap
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(llmq.LlmqError):
        CALLS[call](folder)
    assert not marker.exists()


def test_a_model_type_that_needs_the_checkpoints_code_is_refused(trap: tuple[Path, Path]) -> None:
    with pytest.raises(llmq.LlmqError, match=r"no causal language model for model_type 'vit'.*trust_remote_code=True"):
        llmq.load(trap[0])
