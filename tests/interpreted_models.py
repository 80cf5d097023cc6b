"""Whole models on the Triton kernel in its interpreter, compared with the reference kernel: same logits, same tokens.

Run by `test_whole_models.py` in its own process. In float16 both kernels multiply in float32 and round once; only the order
of their sums differs, so logits differ by what a few linears round differently. In bfloat16 the interpreter truncates where a
GPU rounds (`tests/interpreted_wna16.py`): only logits are compared, and less closely.
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
"""Architecture -> launches per block with fused linears. qwen2: grouped queries, biases of some linears, windows; opt: one
key head per query head, biases of all linears."""


@dataclass(frozen=True)
class Expected:
    """A checkpoint and the result of the reference kernel: logits of all ids, tokens after the first sequence."""

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
        assert {module.choice(model.dtype, rows).kernel.name for module in linears} == {kernel}
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def written(model: Any, ids: Tensor, new: int = NEW) -> Tensor:
    return model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=new, do_sample=False)


def expected(folder: Path, ids: Tensor, new: int = NEW) -> Expected:
    model = loaded(folder, "reference")
    return Expected(folder, ids, logits(model, ids), written(model, ids, new))


def assert_near(got: Tensor, want: Tensor, share: float = STEPS) -> None:
    assert float((got - want).abs().max()) <= share * float(want.abs().max())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of x of every launch."""
    rows: list[int] = []
    launch = wna16._launch
    monkeypatch.setattr(wna16, "_launch", lambda x, *rest: rows.append(len(x)) or launch(x, *rest))
    return rows


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((arch, bits, symmetric), id=f"{arch}-int{bits}-{'sym' if symmetric else 'asym'}", marks=marks)
        for arch, bits, symmetric, marks in (
            ("qwen2", 4, True, ()),
            ("opt", 4, False, ()),
            ("opt", 8, True, ()),
            ("qwen2", 4, False, pytest.mark.slow),
            ("qwen2", 8, False, pytest.mark.slow),
        )
    ],
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Expected]:
    arch, bits, symmetric = request.param
    folder = tmp_path_factory.mktemp(arch) / "out"
    config = llmq.QuantConfig(method="rtn", bits=bits, group_size=32, symmetric=symmetric, dtype="float16")
    llmq.quantize(tiny_model(arch, layers=2), folder, config)
    return arch, expected(folder, IDS)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_tiny_model(tiny: tuple[str, Expected], fuse: bool, launched: list[int]) -> None:
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
    assert set(launched) == {1, 12}, "the kernel ran for every token"


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_bfloat16_through_the_upcast_form(tmp_path: Path, fuse: bool, launched: list[int]) -> None:
    config = llmq.QuantConfig(method="rtn", group_size=32, symmetric=False, dtype="bfloat16")
    llmq.quantize(tiny_model("llama", layers=2), tmp_path / "out", config)
    want = expected(tmp_path / "out", IDS)
    assert_near(logits(loaded(tmp_path / "out", "triton", fuse), IDS), want.logits, 2**-5)
    assert launched


@pytest.fixture(scope="module", params=[True, False], ids=["rtn-sym", "gptq-asym"])
def two_blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
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
    return expected(folder, ids, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_two_blocks_of_the_demo_model(two_blocks: Expected, fuse: bool, launched: list[int]) -> None:
    model, ids = loaded(two_blocks.folder, "triton", fuse), two_blocks.ids
    assert_near(logits(model, ids), two_blocks.logits)
    write = llmq.generate_fast if fuse else written
    assert torch.equal(write(model, ids, 3), two_blocks.tokens)
    assert len(launched) == 2 * (1 + 3) * (4 if fuse else 7)
