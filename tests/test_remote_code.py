"""Code in a checkpoint runs only if the caller passes trust_remote_code=True; nothing is read from stdin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llmq
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
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


CALLS = {
    "load": "llmq.load(PATH)",
    "quantize": "llmq.quantize(PATH, PATH + '-out', llmq.QuantConfig('rtn'))",
    "preview": "llmq.preview(PATH, llmq.QuantConfig('rtn'))",
    "generate": "evaluation.generate_text(PATH, 'hello')",
    "evaluate": "evaluation.evaluate([('trap', PATH)], window=16)",
}


@pytest.mark.parametrize("call", CALLS)
def test_code_in_a_checkpoint_is_not_run(trap: tuple[Path, Path], call: str) -> None:
    folder, marker = trap
    code = f"import llmq, llmq.evaluation as evaluation; PATH = {str(folder)!r}; {CALLS[call]}"
    done = subprocess.run([sys.executable, "-c", code], input="y\n" * 9, capture_output=True, text=True, cwd=ROOT)
    assert not marker.exists()
    assert done.returncode == 1
    assert "LlmqError" in done.stderr.strip().splitlines()[-1]


def test_a_model_type_that_needs_the_checkpoints_code_is_refused(trap: tuple[Path, Path]) -> None:
    with pytest.raises(llmq.LlmqError, match=r"no causal language model for model_type 'vit'.*trust_remote_code=True"):
        llmq.load(trap[0])
