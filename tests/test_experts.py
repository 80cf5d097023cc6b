"""Mixtures of experts: taken apart exactly, quantized expert by expert, stored as engines read them, served packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmq
from llmq.blocks.capture import Call, capture
from llmq.blocks.experts import Expert, join, split
from llmq.blocks.stacks import find_stacks
from llmq.blocks.statistics import Statistics
from llmq.config import QuantConfig
from llmq.core.grid import Grid
from llmq.core.scheme import Scheme
from llmq.errors import LlmqError
from llmq.methods.rtn import rtn
from llmq.quantization import experts
from llmq.quantization.plan import Planned
from llmq.quantization.rounding import Recipe
from llmq.serving.linear import QuantLinear
from llmq.transforms.discovery import find_pairs
from llmq.transforms.pairs import Pair
from llmq.transforms.probe import Probe
from tests.moe import FUSED, SPLIT, moe_model

IDS = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(1))


def config(method: str = "rtn", **own: Any) -> QuantConfig:
    return QuantConfig(method, **{"group_size": 32, "dtype": "float32", **own})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS[:2], use_cache=False).logits


@pytest.mark.parametrize("arch", [*SPLIT, *FUSED])
def test_a_model_taken_apart_computes_the_same_bits(arch: str) -> None:
    model = moe_model(arch, dtype=torch.float64)
    want = logits(model)
    stacks = find_stacks(model)
    fused = split(model, stacks)
    assert stacks
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for stack in stacks for name, _ in stack.linears()} <= linears
    assert torch.equal(logits(model), want)
    some = model.get_submodule(stacks[0].linear(0, stacks[0].parts[0]))
    some.weight.data.mul_(2)
    changed = logits(model)
    assert not torch.equal(changed, want)
    join(model, stacks, fused)
    assert torch.equal(logits(model), changed), "the linears' weights are views of the fused parameter"


@pytest.mark.parametrize("arch", [*SPLIT, *FUSED])
def test_quantized_and_loaded_packed(arch: str, tmp_path: Path) -> None:
    """The packed model computes what its own dequantized weights give, the routers are as they were."""
    model = moe_model(arch)
    model.save_pretrained(tmp_path / "source")
    report = llmq.quantize(tmp_path / "source", tmp_path / "out", config())
    assert llmq.preview(tmp_path / "source", config()).after == report.checkpoint_bytes
    packed = llmq.load(tmp_path / "out")
    linears = {name: m for name, m in packed.named_modules() if isinstance(m, QuantLinear)}
    stacks = find_stacks(model)
    assert len(linears) == len(report.layers)
    assert sum(_inside(name, stacks) for name in linears) == sum(s.experts * len(s.parts) for s in stacks)
    for stack in stacks:
        parameter = model.get_parameter(f"{stack.module}.{stack.parameter}").data
        owner = packed.get_submodule(stack.module)
        for expert in range(stack.experts):
            matrix = parameter[expert].T if stack.transposed else parameter[expert]
            for part, child in zip(stack.parts, _children(owner, expert, stack, stacks), strict=True):
                part.of(matrix).copy_(child.dequantize())
    for name, module in model.named_modules():
        if name in linears:
            module.weight.data.copy_(linears[name].dequantize())
    torch.testing.assert_close(logits(packed), logits(model), rtol=1e-4, atol=1e-4)


def _inside(name: str, stacks: Any) -> bool:
    return any(name.startswith(f"{stack.module}.") for stack in stacks)


def _children(owner: nn.Module, expert: int, stack: Any, stacks: Any) -> list[Any]:
    """The modules of an expert that a stack's parts became, which the files may name otherwise."""
    mine = list(owner.get_submodule(str(expert)).children())
    of_module = [each for each in stacks if each.module == stack.module]
    before = sum(len(each.parts) for each in of_module[: of_module.index(stack)])
    return mine[before : before + len(stack.parts)]


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text"])
def test_calibrated_methods_beat_nearest_rounding(arch: str, method: str, tmp_path: Path) -> None:
    model = moe_model(arch)
    want = logits(model)
    lost = {}
    for each in ("rtn", method):
        llmq.quantize(model, tmp_path / each, config(each), None if each == "rtn" else IDS)
        lost[each] = float((logits(llmq.load(tmp_path / each)) - want).norm() / want.norm())
    assert lost[method] < lost["rtn"]


@pytest.mark.parametrize("arch", SPLIT)
def test_files_are_those_of_save_pretrained_and_stock_transformers_computes_the_same(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = moe_model(arch)
    model.save_pretrained(tmp_path / "dense")
    llmq.quantize(model, tmp_path / "out", config())
    dense, packed = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    as_dense = {name.replace(".weight_packed", ".weight") for name in packed}
    assert {name for name in as_dense if not name.endswith(("_scale", "_shape", "_zero_point"))} == set(dense)
    mine = llmq.load(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager", dtype=torch.float32)
    torch.testing.assert_close(logits(mine), logits(stock), rtol=1e-4, atol=1e-4)
    mine.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in packed.items())


def test_fused_files_are_noted_and_readable_here(tmp_path: Path) -> None:
    report = llmq.quantize(moe_model("gpt_oss"), tmp_path / "out", config())
    assert any("only llmq reads" in note for note in report.notes)
    assert not any(
        "only llmq reads" in note for note in llmq.quantize(moe_model("mixtral"), tmp_path / "b", config()).notes
    )


@pytest.mark.parametrize("arch", ["qwen2_moe", "llama4_text"])
def test_what_chooses_experts_stays_dense(arch: str, tmp_path: Path) -> None:
    model = moe_model(arch)
    llmq.quantize(model, tmp_path / "out", config())
    packed = llmq.load(tmp_path / "out").state_dict()
    chosen = [
        name for name in model.state_dict() if "router" in name or ".mlp.gate." in name or "shared_expert_gate" in name
    ]
    assert chosen
    assert all(torch.equal(packed[name], model.state_dict()[name]) for name in chosen)


def test_experts_that_are_ignored_stay_fused(tmp_path: Path) -> None:
    model = moe_model("mixtral")
    report = llmq.quantize(model, tmp_path / "out", config("gptq", ignore=("re:.*experts.*",)), IDS)
    assert len(report.layers) == 8
    packed = llmq.load(tmp_path / "out").state_dict()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(packed[name], model.state_dict()[name])
    with pytest.raises(
        LlmqError, match="ignore all linears of model.layers.0.mlp.experts or none; 4 of 12 are ignored"
    ):
        llmq.quantize(model, tmp_path / "part", config(ignore=("re:.*experts.*w2",)))


def test_the_experts_of_a_layer_have_one_scheme(tmp_path: Path) -> None:
    """96 inputs of downs take no group of 64, so gates and ups take none either."""
    report = llmq.quantize(moe_model("qwen3_moe", moe_intermediate_size=96), tmp_path / "out", config(group_size=64))
    sizes = {row.name.rpartition(".")[2]: row.group_size for row in report.layers if ".experts." in row.name}
    assert sizes == {"gate_proj": 32, "up_proj": 32, "down_proj": 32}
    assert {row.group_size for row in report.layers if ".experts." not in row.name} == {64}


def test_memory_for_moments_is_bounded_without_changing_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert at a time, with a pass for the mean: the same codes but for how the mean is summed."""
    model = moe_model("qwen3_moe")
    llmq.quantize(model, tmp_path / "all", config("gptq"), IDS)
    monkeypatch.setattr(experts, "MOMENT_BYTES", 1)
    llmq.quantize(model, tmp_path / "one", config("gptq"), IDS)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("all", "one"))
    assert a.keys() == b.keys()
    same = [bool(torch.equal(a[name], b[name])) for name in a]
    assert sum(same) >= 0.9 * len(same)


def linear_for(columns: int = 64, rows: int = 32) -> tuple[nn.Module, list[Planned], Tensor]:
    """A block with one linear, its plan, and inputs with correlated columns [4096, K]."""
    generator = torch.Generator().manual_seed(3)
    block = nn.Module()
    block.down = nn.Linear(columns, rows, bias=False)
    block.down.weight.data = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(4096, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    planned = Planned("b.down", (rows, columns), Scheme(Grid(4, 32, True), None, torch.float32))
    return block, [planned], mixed


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


RECIPE = Recipe.of(QuantConfig("gptq"))


def test_an_expert_without_tokens_is_rounded_for_the_mean_of_its_layer() -> None:
    block, planned, x = linear_for()
    ((_, report),) = experts.round_expert(block, "b", planned, Statistics(torch.zeros(64, 64), 0), moment(x), RECIPE)
    assert report.notes == (experts.UNREACHED,)
    assert 0 < report.error < report.rtn_error
    assert report.tokens == 0


def test_few_tokens_are_mixed_with_the_mean_and_many_are_not() -> None:
    for tokens, notes in ((40, (experts.SHRUNK,)), (4096, ())):
        block, planned, x = linear_for()
        own = Statistics(moment(x[:tokens]), tokens)
        ((codes, report),) = experts.round_expert(block, "b", planned, own, moment(x), RECIPE)
        assert report.notes == notes
        weight = linear_for()[0].down.weight.data
        plain = RECIPE.rounding(weight, Statistics(moment(x[:tokens]), tokens), RECIPE.target(planned[0]))
        assert torch.equal(codes.codes, plain.weight.codes) == (tokens == 4096)


def test_nearest_codes_where_held_out_tokens_ask_for_them() -> None:
    """Held-out tokens from another distribution than the fitted ones: feedback is worse than none."""
    block, planned, x = linear_for()
    other = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) * 3
    kept = moment(x[:200] @ other)
    seen = Statistics(moment(x[:600]) * 0.75 + kept * 0.25, 800, kept, 200)
    weight = block.down.weight.data.clone()
    ((codes, report),) = experts.round_expert(block, "b", planned, seen, moment(x), RECIPE)
    assert report.holdout_ratio is not None
    assert (experts.NEAREST in report.notes) == (_nearest_is_better(weight, x, kept, planned))
    if experts.NEAREST in report.notes:
        shrunk = Statistics((seen.hessian * 800 + moment(x) * 64) / 864, 800)
        assert torch.equal(codes.codes, rtn(weight, shrunk, RECIPE.target(planned[0])).weight.codes)


def _nearest_is_better(weight: Tensor, x: Tensor, kept: Tensor, planned: list[Planned]) -> bool:
    fitted = Statistics((moment(x[:600]) * 600 + moment(x) * 64) / 664, 600)
    lost = []
    for rounding in (RECIPE.rounding, rtn):
        error = rounding(weight, fitted, RECIPE.target(planned[0])).weight.dequantize(torch.float32) - weight
        lost.append(float(((error @ kept) * error).sum()))
    return lost[1] < lost[0]


def test_notes_are_counted() -> None:
    block, planned, x = linear_for()
    nothing = Statistics(torch.zeros(64, 64), 0)
    rows = [report for _, report in experts.round_expert(block, "b", planned, nothing, moment(x), RECIPE)]
    assert experts.expert_notes(rows) == (f"1 linears of experts in 1 layers: {experts.UNREACHED}",)


def test_a_run_counts_what_became_of_its_experts(tmp_path: Path) -> None:
    report = llmq.quantize(moe_model("qwen3_moe"), tmp_path / "out", config("gptq"), IDS)
    stored = json.loads((tmp_path / "out" / "llmq_report.json").read_text())
    assert any("linears of experts in 2 layers: few calibration tokens" in note for note in stored["notes"])
    assert not any("experts" in line for line in report.fallbacks)
    assert any(experts.SHRUNK in row["notes"] for row in stored["layers"])


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_every_expert_on_every_token(arch: str, tmp_path: Path) -> None:
    model = moe_model(arch)
    some = llmq.quantize(model, tmp_path / "some", config("gptq"), IDS)
    every = llmq.quantize(model, tmp_path / "all", config("gptq", all_experts=True), IDS)
    tokens = [[row.tokens for row in report.layers if ".experts." in row.name] for report in (some, every)]
    assert max(tokens[0]) < IDS.numel()
    if arch == "llama4_text":  # its experts are given all tokens with most of them zeroed: nothing can be added
        assert tokens[1] == tokens[0]
    else:
        assert set(tokens[1]) == {IDS.numel()}
    assert logits(llmq.load(tmp_path / "all")).isfinite().all()


def test_experts_without_a_table_of_chosen_ones() -> None:
    x, weights = torch.ones(3, 4), torch.ones(3, 2)
    assert experts.to_all_experts(4, ((x,), {})) == ((x,), {})
    with pytest.raises(LlmqError, match="leave --moe-all-experts out"):
        experts.to_all_experts(4, ((x,), {"weights": weights}))
    chosen = torch.tensor([[0, 1], [1, 2], [3, 0]])
    (same, everyone), rest = experts.to_all_experts(4, ((x, chosen), {"weights": weights}))
    assert same is x
    assert everyone.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.equal(rest["weights"], torch.full((3, 4), 0.25))


def test_pairs_of_a_mixture_are_found_on_a_small_probe() -> None:
    """Experts share one expert's parameters there; the norm before them feeds the router, and is left alone."""
    model = moe_model("qwen3_moe", num_experts=8)
    block = model.model.layers[0]
    split(block, find_stacks(block))
    call, hidden = _called(model, block)
    probe = Probe(block, call, hidden)
    of_experts = {id(p): p for m in probe.block.modules() if isinstance(m, Expert) for p in m.parameters()}
    assert len(of_experts) == 3
    found = find_pairs(block, call, hidden, [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")])
    assert isinstance(found.pairs[0], Pair)


def _called(model: Any, block: nn.Module) -> tuple[Call, Tensor]:
    captured = capture(model, lambda batch: model.base_model(input_ids=batch, use_cache=False), [IDS[:1, :16]])
    return captured.calls[0][0], captured.hidden[0]


class Unclear(nn.Module):
    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for index, shape in enumerate(shapes):
            self.register_parameter(f"w{index}", nn.Parameter(torch.randn(shape)))


@pytest.mark.parametrize("shapes", [((4, 6, 8), (4, 5, 7)), ((4, 6, 8), (4, 8, 6), (4, 8, 6))], ids=str)
def test_experts_whose_product_cannot_be_told_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    block = nn.Module()
    block.experts = Unclear(*shapes)
    with pytest.raises(
        LlmqError, match=r"experts holds 3-D parameters \(w0 \[4, 6, 8\].*do not show which feeds which"
    ):
        find_stacks(block)
