"""AWQ: lowers the output error, better than the published recipe, leaves the function alone and never makes it worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import llmq
from llmq.blocks.statistics import Statistics
from llmq.core.grid import Grid, fit, quantize
from llmq.methods.base import Rounded, Rounding, Target
from llmq.methods.gptq import gptq
from llmq.methods.rtn import rtn
from llmq.serving.linear import QuantLinear
from llmq.transforms.awq import awq
from llmq.transforms.base import PairReport, TransformContext
from llmq.transforms.pairs import Pair
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

IDS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(2))
WIDTH, TOKENS, GROUP = 64, 2048, 32
GRID = Grid(4, GROUP, True)


class Scale(nn.Module):
    """A norm as far as folding goes: y = x * weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = Scale((torch.rand(WIDTH, generator=generator) + 0.5).to(dtype))
        self.linear = nn.Linear(WIDTH, 48, bias=False, dtype=dtype)
        self.linear.weight.data.copy_(torch.randn(48, WIDTH, generator=generator))
        self.linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


PAIR = Pair("norm", "weight", torch.arange(WIDTH), ("linear",))


def inputs(seed: int) -> Tensor:
    """A few channels a hundred times larger than the rest, as in language models."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, [3, 17, 40]] *= 100
    return x


TARGET = Target(GRID, torch.bfloat16, "search", 0.01)


def statistics_of(fitted: Tensor, held_out: Tensor) -> Statistics:
    return Statistics(
        fitted.T @ fitted / len(fitted), len(fitted), held_out.T @ held_out / len(held_out), len(held_out),
        fitted.abs().mean(0),
    )  # fmt: skip


def observed(block: Block, seed: int = 5) -> Statistics:
    return statistics_of(block.norm(inputs(seed)), block.norm(inputs(seed + 1)))


def transformed(block: Block, rounding: Rounding, seen: Statistics | None = None) -> PairReport:
    """What AWQ makes of the block."""
    return awq(block, PAIR, seen or observed(Block()), TransformContext(rounding, {"linear": TARGET})).applied()


def loss(block: Block, rounding: Rounding) -> float:
    """Output error of the rounded block on inputs that nobody has seen, over the unrounded original."""
    x = inputs(9)
    want = Block()(x)
    fed = block.norm(x)
    seen = Statistics(fed.T @ fed / TOKENS, TOKENS)
    weight = rounding(block.linear.weight.float(), seen, TARGET).weight.dequantize(torch.float32)
    return float((fed @ weight.T - want).pow(2).sum() / want.pow(2).sum())


def published_recipe(block: Block) -> Block:
    """AutoAWQ's search, transcribed (awq/quantize/quantizer.py, `_compute_best_scale`): s = mean|x|^r / (mean of the group-wise
    normalized |w|^(1 - r) + 1e-4), r over 20 steps, normalized by sqrt(max * min), scored by min-max rounding."""
    x = block.norm(inputs(5))
    weight = block.linear.weight.data
    groups = weight.view(-1, GROUP)
    w_mean = (groups.abs() / (groups.abs().amax(1, keepdim=True) + 1e-6)).view_as(weight).mean(0)
    x_mean = x.abs().mean(0)
    best, least = torch.ones(WIDTH), float("inf")
    for step in range(20):
        ratio = step / 20
        s = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        scaled = weight * s
        q = quantize(scaled, *fit(scaled, GRID, torch.bfloat16), GRID).dequantize(torch.float32)
        error = float((x @ (q / s - weight).T).pow(2).mean())
        if error < least:
            best, least = s, error
    made = Block()
    made.norm.weight.data /= best
    made.linear.weight.data *= best
    return made


def plain(weight: Tensor, statistics: Statistics | None, target: Target) -> Rounded:
    return Rounded(quantize(weight, *fit(weight, target.grid, target.dtype), target.grid))


def test_it_lowers_the_error_below_that_of_the_published_recipe() -> None:
    block = Block()
    report = transformed(block, rtn)
    assert report.note is None
    assert report.fitted_ratio is not None
    assert report.held_out_ratio is not None
    assert report.fitted_ratio < 0.5
    ours, theirs = loss(block, rtn), loss(published_recipe(Block()), plain)
    assert ours < 0.55 * loss(Block(), rtn)
    assert ours < theirs


@pytest.mark.parametrize("rounding", [rtn, gptq])
def test_the_function_stays_and_unseen_inputs_gain(rounding: Rounding) -> None:
    block = Block()
    report = transformed(block, rounding)
    torch.testing.assert_close(block(inputs(9)), Block()(inputs(9)), rtol=1e-4, atol=1e-2)
    assert loss(block, rounding) <= loss(Block(), rounding) * 1.02
    assert report.consumers == ("linear",)


def test_in_bfloat16_the_columns_follow_what_the_norm_really_has() -> None:
    """norm' * column' must be norm * column up to the rounding of the column: 1 + w rounded alone is off by per cents."""
    block, before = Block(torch.bfloat16), Block(torch.bfloat16)
    report = transformed(block, rtn)
    assert report.note is None
    product = block.linear.weight.float() * block.norm.weight.float()
    want = before.linear.weight.float() * before.norm.weight.float()
    assert bool(((product - want).abs() <= 2**-8 * want.abs()).all())


def test_a_rounding_that_gains_nothing_rolls_back() -> None:
    def exact_without(weight: Tensor, statistics: Statistics | None, target: Target) -> Rounded:
        spoiled = not torch.equal(weight, Block().linear.weight)
        return rtn(weight * (3 if spoiled else 1), statistics, target)

    block = Block()
    report = transformed(block, exact_without)
    assert report.note == "no gain on held-out windows with the rounding that follows"
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), Block().parameters(), strict=True))


def test_even_inputs_need_no_scale() -> None:
    block = Block()
    block.linear.weight.data = torch.sign(block.linear.weight.data)
    assert transformed(block, rtn).note == "no scale lowers the error"


@pytest.mark.parametrize("channel", [0.0, 1.0])
def test_zero_and_constant_channels(channel: float) -> None:
    block = Block()
    x = block.norm(inputs(5))
    x[:, 7] = channel
    block.linear.weight.data[:, 9] = 0
    report = transformed(block, rtn, statistics_of(x, x))
    assert report.note is None
    assert all(bool(torch.isfinite(p).all()) for p in block.parameters())
    assert bool((block.linear.weight[:, 9] == 0).all())


def test_scales_that_do_not_fit_the_storage_dtype_are_refused() -> None:
    block = Block(torch.float16)
    block.linear.weight.data.mul_(2.0**12)
    block.linear.weight.data[1, 3] = 60000
    before = [p.clone() for p in block.parameters()]
    report = transformed(block, rtn)
    assert report.note == "the scaled weights do not fit torch.float16"
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), before, strict=True))


def test_a_candidate_that_cannot_be_rounded_is_rejected_and_stops_nothing() -> None:
    """GPTQ may fail to factor what the search proposes; the run must go on with the weights as they are."""

    def fails_when_scaled(weight: Tensor, statistics: Statistics | None, target: Target) -> Rounded:
        if not torch.equal(weight, Block().linear.weight):
            raise llmq.LlmqError("the Hessian cannot be factored")
        return rtn(weight, statistics, target)

    block = Block()
    report = transformed(block, fails_when_scaled)
    assert report.note == "no gain on held-out windows with the rounding that follows"
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), Block().parameters(), strict=True))


def test_held_out_windows_decide_and_not_those_the_scales_were_chosen_by() -> None:
    """Held-out inputs whose large channels are others than the fitted ones: scales that gain here lose there."""
    fitted = Block().norm(inputs(5))
    other = Block().norm(torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(8)))
    other[:, [5, 11, 29, 30, 31]] *= 1000
    gains = transformed(Block(), rtn, statistics_of(fitted, fitted))
    loses = transformed(Block(), rtn, statistics_of(fitted, other))
    assert gains.fitted_ratio == loses.fitted_ratio
    assert gains.note is None
    assert loses.held_out_ratio is not None
    assert gains.held_out_ratio is not None
    assert loses.held_out_ratio > 1 > gains.held_out_ratio
    assert loses.note == "no gain on held-out windows with the rounding that follows"


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_torchs_default_dtype_decides_nothing(tmp_path: Path, default: torch.dtype) -> None:
    config, before = llmq.QuantConfig("awq+gptq", group_size=32), torch.get_default_dtype()
    llmq.quantize(tiny_model("llama", layers=2), tmp_path / "a", config, WINDOWS)
    model = tiny_model("llama", layers=2)
    torch.set_default_dtype(default)
    try:
        llmq.quantize(model, tmp_path / "b", config, WINDOWS)
    finally:
        torch.set_default_dtype(before)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def twin_of(folder: Path, model: nn.Module, arch: str) -> nn.Module:
    """A plain model with the checkpoint's norms, biases and embeddings, and the dequantized weights of `model`."""
    twin = tiny_model(arch)
    twin.load_state_dict(model.state_dict(), strict=False)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            twin.get_submodule(name).weight.data = module.dequantize()
    return twin


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_quantized_saved_and_loaded(tmp_path: Path, arch: str, method: str) -> None:
    config = llmq.QuantConfig(method=method, group_size=32, dtype="float32")
    report = llmq.quantize(tiny_model(arch), tmp_path / "out", config, WINDOWS)
    assert any(pair.note is None for pair in report.pairs)
    model = llmq.load(tmp_path / "out")
    twin = twin_of(tmp_path / "out", model, arch)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("smooth" in name or "scale_pair" in name for name in stored), "a plain checkpoint"


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    config = llmq.QuantConfig(method="awq+gptq", group_size=32)
    for name in ("a", "b"):
        llmq.quantize(tiny_model("llama"), tmp_path / name, config, WINDOWS)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
