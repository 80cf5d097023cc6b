"""Whole models on the Triton kernel, in its interpreter, beside the reference kernel: the same logits, the same tokens.

Run by `test_whole_models.py` in a process of its own. float16: the reference multiplies in float32 and rounds once, the
kernel does too but for the order of its sums, so that logits differ by what a few linears round the other way. In bfloat16
the interpreter cuts off where a GPU rounds (`tests/interpreted_wna16.py`): logits alone are compared, and less closely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmq
from llmq.kernels import wna16
from llmq.serving.fused import fused_linears
from llmq.serving.linear import QuantLinear
from tests.tiny import VOCAB, tiny_model

NEW = 4
STEPS = 2 * 2**-10  # two steps of float16, as a share of the largest logit
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
ARCHITECTURES = {"qwen2": 4, "opt": 4}
"""And the launches in a block whose linears are joined. qwen2: grouped queries, biases of some linears, windows; opt: as many
heads of keys as of queries, biases of all."""


@dataclass(frozen=True)
class Said:
    """A checkpoint, and what the reference kernel makes of it: logits of all ids, tokens after the first sequence."""

    folder: Path
    ids: Tensor
    logits: Tensor
    tokens: Tensor


def loaded(folder: Path, kernel: str, fuse: bool = False) -> Any:
    model = llmq.load(folder, kernel=kernel, fuse=fuse)
    model.generation_config.eos_token_id = None
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert linears
    for rows in (1, 24, 512):
        assert {module.choice(model.dtype, rows).kernel.NAME for module in linears} == {kernel}
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def written(model: Any, ids: Tensor, new: int = NEW) -> Tensor:
    return model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=new, do_sample=False)


def said(folder: Path, ids: Tensor, new: int = NEW) -> Said:
    model = loaded(folder, "reference")
    return Said(folder, ids, logits(model, ids), written(model, ids, new))


def assert_near(found: Tensor, want: Tensor, share: float = STEPS) -> None:
    assert float((found - want).abs().max()) <= share * float(want.abs().max())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of x of every launch."""
    rows: list[int] = []
    launch = wna16._launch
    monkeypatch.setattr(wna16, "_launch", lambda x, *rest: rows.append(len(x)) or launch(x, *rest))
    return rows


@pytest.fixture(
    scope="module",
    params=[("qwen2", 4, True), ("qwen2", 4, False), ("opt", 4, False), ("opt", 8, True), ("qwen2", 8, False)],
    ids=lambda value: f"{value[0]}-int{value[1]}-{'sym' if value[2] else 'asym'}",
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Said]:
    arch, bits, symmetric = request.param
    folder = tmp_path_factory.mktemp(arch) / "out"
    config = llmq.QuantConfig(method="rtn", bits=bits, group_size=32, symmetric=symmetric, dtype="float16")
    llmq.quantize(tiny_model(arch, layers=2), folder, config)
    return arch, said(folder, IDS)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_tiny_model(tiny: tuple[str, Said], fuse: bool, launched: list[int]) -> None:
    arch, want = tiny
    model = loaded(want.folder, "triton", fuse)
    assert bool(fused_linears(model)) == fuse
    assert_near(logits(model, IDS), want.logits)
    linears = sum(isinstance(module, QuantLinear) for module in model.modules())
    assert launched == [IDS.numel()] * (2 * ARCHITECTURES[arch] if fuse else linears)
    assert torch.equal(written(model, IDS), want.tokens)
    warmed = llmq.warmup(model, rows=[1, 12])
    assert {(row.kernel, row.rows) for row in warmed} == {("triton", 1), ("triton", 12)}
    launched.clear()
    assert torch.equal(llmq.generate_fast(model, IDS[:1], NEW), want.tokens)
    assert set(launched) == {1, 12}, "every token went through the kernel"


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_bfloat16_through_the_upcast_form(tmp_path: Path, fuse: bool, launched: list[int]) -> None:
    config = llmq.QuantConfig(method="rtn", group_size=32, symmetric=False, dtype="bfloat16")
    llmq.quantize(tiny_model("llama", layers=2), tmp_path / "out", config)
    want = said(tmp_path / "out", IDS)
    assert_near(logits(loaded(tmp_path / "out", "triton", fuse), IDS), want.logits, 2**-5)
    assert launched


@pytest.fixture(scope="module", params=[True, False], ids=["rtn-sym", "gptq-asym"])
def two_blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Said:
    """The first two blocks of the demo model, between its embedding and its head."""
    from llmq.cli.commands import open_named
    from llmq.hf.inference import open_model

    model, tokenizer = open_model(open_named("demo"), "float16")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    ids = tokenizer("The capital of France is Paris. The capital of", return_tensors="pt").input_ids
    folder, method = tmp_path_factory.mktemp("demo") / "out", "rtn" if request.param else "gptq"
    config = llmq.QuantConfig(method=method, group_size=64, symmetric=request.param, dtype="float16")
    windows = None if request.param else torch.randint(3, 49152, (4, 256), generator=torch.Generator().manual_seed(2))
    llmq.quantize(model, folder, config, windows)
    return said(folder, ids, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_two_blocks_of_the_demo_model(two_blocks: Said, fuse: bool, launched: list[int]) -> None:
    model, ids = loaded(two_blocks.folder, "triton", fuse), two_blocks.ids
    assert_near(logits(model, ids), two_blocks.logits)
    write = llmq.generate_fast if fuse else written
    assert torch.equal(write(model, ids, 3), two_blocks.tokens)
    assert len(launched) == 2 * (1 + 3) * (4 if fuse else 7)
