"""AWQ: lowers the output error, better than the published recipe, leaves the function alone and never makes it worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import llmq
from llmq.blocks.statistics import Observed
from llmq.core.grid import Grid, fit, quantize
from llmq.core.quantized import QuantizedWeight
from llmq.methods.base import Target
from llmq.methods.gptq import gptq
from llmq.methods.rtn import rtn
from llmq.serving.linear import QuantLinear
from llmq.transforms.awq import awq
from llmq.transforms.base import PairReport, Round, Task
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


def observed(block: Block, seed: int = 5) -> Observed:
    fit_, held = block.norm(inputs(seed)), block.norm(inputs(seed + 1))
    return Observed(fit_.abs().mean(0), fit_.T @ fit_ / TOKENS, held.T @ held / TOKENS)


def treat(block: Block, round_: Round, seen: Observed | None = None) -> PairReport:
    """What AWQ makes of the block."""
    task = Task({"linear": GRID}, round_, torch.bfloat16)
    return awq(block, PAIR, seen or observed(Block()), task).settled()


def rounded(weight: Tensor, hessian: Tensor, grid: Grid) -> QuantizedWeight:
    return rtn(weight, hessian, Target(grid, torch.bfloat16, "search", 0.01)).weight


def rounded_with_feedback(weight: Tensor, hessian: Tensor, grid: Grid) -> QuantizedWeight:
    return gptq(weight, hessian, Target(grid, torch.bfloat16, "search", 0.01)).weight


def loss(block: Block, round_: Round) -> float:
    """Output error of the rounded block on inputs that nobody has seen, over the unrounded original."""
    x = inputs(9)
    want = Block()(x)
    fed = block.norm(x)
    weight = round_(block.linear.weight.float(), fed.T @ fed / TOKENS, GRID).dequantize(torch.float32)
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


def plain(weight: Tensor, hessian: Tensor, grid: Grid) -> QuantizedWeight:
    return quantize(weight, *fit(weight, grid, torch.bfloat16), grid)


def test_it_lowers_the_error_below_that_of_the_published_recipe() -> None:
    block = Block()
    report = treat(block, rounded)
    assert report.note is None
    assert report.fit is not None
    assert report.held is not None
    assert report.fit < 0.5
    ours, theirs = loss(block, rounded), loss(published_recipe(Block()), plain)
    assert ours < 0.55 * loss(Block(), rounded)
    assert ours < theirs


@pytest.mark.parametrize("round_", [rounded, rounded_with_feedback])
def test_the_function_stays_and_unseen_inputs_gain(round_: Round) -> None:
    block = Block()
    report = treat(block, round_)
    torch.testing.assert_close(block(inputs(9)), Block()(inputs(9)), rtol=1e-4, atol=1e-2)
    assert loss(block, round_) <= loss(Block(), round_) * 1.02
    assert report.consumers == ("linear",)


def test_in_bfloat16_the_columns_follow_what_the_norm_really_has() -> None:
    """norm' * column' must be norm * column up to the rounding of the column: 1 + w rounded alone is off by per cents."""
    block, before = Block(torch.bfloat16), Block(torch.bfloat16)
    report = treat(block, rounded)
    assert report.note is None
    product = block.linear.weight.float() * block.norm.weight.float()
    want = before.linear.weight.float() * before.norm.weight.float()
    assert bool(((product - want).abs() <= 2**-8 * want.abs()).all())


def test_a_rounding_that_gains_nothing_rolls_back() -> None:
    def exact_without(weight: Tensor, hessian: Tensor, grid: Grid) -> QuantizedWeight:
        spoiled = not torch.equal(weight, Block().linear.weight)
        return rounded(weight * (3 if spoiled else 1), hessian, grid)

    block = Block()
    report = treat(block, exact_without)
    assert report.note == "no gain on held-out windows with the rounding that follows"
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), Block().parameters(), strict=True))


def test_even_inputs_need_no_scale() -> None:
    block = Block()
    block.linear.weight.data = torch.sign(block.linear.weight.data)
    assert treat(block, rounded).note == "no scale lowers the error"


@pytest.mark.parametrize("channel", [0.0, 1.0])
def test_zero_and_constant_channels(channel: float) -> None:
    block = Block()
    x = block.norm(inputs(5))
    x[:, 7] = channel
    block.linear.weight.data[:, 9] = 0
    report = treat(block, rounded, Observed(x.abs().mean(0), x.T @ x / TOKENS, x.T @ x / TOKENS))
    assert report.note is None
    assert all(bool(torch.isfinite(p).all()) for p in block.parameters())
    assert bool((block.linear.weight[:, 9] == 0).all())


def test_scales_that_do_not_fit_the_storage_dtype_are_refused() -> None:
    block = Block(torch.float16)
    block.linear.weight.data.mul_(2.0**12)
    block.linear.weight.data[1, 3] = 60000
    before = [p.clone() for p in block.parameters()]
    report = treat(block, rounded)
    assert report.note == "the scaled weights do not fit torch.float16"
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), before, strict=True))


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
