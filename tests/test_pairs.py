"""Rescalable pairs: found on every architecture without a table, proven, and refused where the proof fails."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call
from llmq.transforms import discovery
from llmq.transforms.discovery import find_pairs
from llmq.transforms.pairs import KnownPairs, NoPair, Pair, scale_consumer, scale_producer
from tests.tiny import ARCHITECTURES, HIDDEN, INTERMEDIATE, taken_apart

ROOT = Path(__file__).resolve().parent.parent

LLAMA = {
    "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attn.v_proj": "self_attn.o_proj",
    "post_attention_layernorm": "mlp.gate_proj mlp.up_proj",
    "mlp.up_proj": "mlp.down_proj",
}
GEMMA = {
    **{k: v for k, v in LLAMA.items() if k != "post_attention_layernorm"},
    "pre_feedforward_layernorm": "mlp.gate_proj mlp.up_proj",
}
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "stablelm"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "phi3": {
        "input_layernorm": "self_attn.qkv_proj",
        "self_attn.qkv_proj": "self_attn.o_proj",
        "post_attention_layernorm": "mlp.gate_up_proj",
        "mlp.gate_up_proj": "mlp.down_proj",
    },
    "olmo2": {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"},
    "cohere": {
        "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
        "self_attn.v_proj": "self_attn.o_proj",
        "mlp.up_proj": "mlp.down_proj",
    },
    "starcoder2": {
        "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "self_attn.v_proj": "self_attn.o_proj",
        "post_attention_layernorm": "mlp.c_fc",
    },
    "opt": {
        "self_attn_layer_norm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "self_attn.v_proj": "self_attn.out_proj",
        "final_layer_norm": "fc1",
        "fc1": "fc2",
    },
    "gpt_neox": {
        "input_layernorm": "attention.query_key_value",
        "attention.query_key_value": "attention.dense",
        "post_attention_layernorm": "mlp.dense_h_to_4h",
    },
    "bloom": {
        "input_layernorm": "self_attention.query_key_value",
        "self_attention.query_key_value": "self_attention.dense",
        "post_attention_layernorm": "mlp.dense_h_to_4h",
    },
    "falcon": {
        "input_layernorm": "self_attention.query_key_value mlp.dense_h_to_4h",
        "self_attention.query_key_value": "self_attention.dense",
    },
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pairs_of_every_architecture(arch: str) -> None:
    block, call, hidden, groups = taken_apart(arch)
    found = find_pairs(block, call, hidden, groups).pairs
    assert [row.consumers for row in found] == groups
    assert {row.producer: " ".join(row.consumers) for row in found if isinstance(row, Pair)} == EXPECTED[arch]
    assert all(row.reason for row in found if isinstance(row, NoPair))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_any_scale_preserves_the_blocks_function(arch: str) -> None:
    block, call, hidden, groups = taken_apart(arch, 1)
    before = call(block, hidden)
    generator = torch.Generator().manual_seed(3)
    for pair in find_pairs(block, call, hidden, groups).pairs:
        if not isinstance(pair, Pair):
            continue
        scaled = copy.deepcopy(block)
        factors = torch.ones(len(scaled.get_submodule(pair.producer).weight))
        used = pair.channels.unique()
        factors[used] = torch.rand(len(used), generator=generator) * 3 + 0.2
        scale_producer(scaled.get_submodule(pair.producer), pair, factors)
        for name in pair.consumers:
            scale_consumer(scaled.get_submodule(name), 1 / factors[pair.channels])
        after = call(scaled, hidden)
        assert not torch.equal(after, before), "something was scaled"
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_channels_of_grouped_and_fused_heads() -> None:
    """4 heads of 16 read 2 value heads; in phi3 these are rows 96 .. 127 of the fused projection."""
    shared = torch.tensor([head // 2 * 16 + i for head in range(4) for i in range(16)])
    for arch, offset in (("llama", 0), ("phi3", 96)):
        block, call, hidden, groups = taken_apart(arch)
        pair = find_pairs(block, call, hidden, groups).pairs[1]
        assert isinstance(pair, Pair)
        assert torch.equal(pair.channels, shared + offset)
    block, call, hidden, groups = taken_apart("phi3")
    pair = find_pairs(block, call, hidden, groups).pairs[3]
    assert isinstance(pair, Pair)
    assert torch.equal(pair.channels, torch.arange(INTERMEDIATE, 2 * INTERMEDIATE)), "up is the second half"


def test_norms_that_add_one_are_recognized() -> None:
    forms = {}
    for arch in ("llama", "gemma2", "opt"):
        block, call, hidden, groups = taken_apart(arch)
        forms[arch] = find_pairs(block, call, hidden, groups).pairs[0].form  # type: ignore[union-attr]
    assert forms == {"llama": "weight", "gemma2": "one_plus", "opt": "weight"}


class Toy(nn.Module):
    """norm -> linear -> activation -> linear, with a leak that the proof must see."""

    def __init__(self, activation: nn.Module, leak: str = "", affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=affine)
        self.up, self.down = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)
        self.activation, self.leak = activation, leak

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        inner = self.activation(self.up(normed))
        out = x + self.down(inner)
        if self.leak == "norm":
            out = out + normed
        if self.leak == "inner":
            out = out + inner[..., :HIDDEN]
        return out


def toy(**kwargs: object) -> tuple[Pair | NoPair, ...]:
    block = Toy(**{"activation": nn.ReLU(), **kwargs})  # type: ignore[arg-type]
    hidden = torch.randn(1, 16, HIDDEN)
    return find_pairs(block, Call(0, (None,), {}), hidden, [("up",), ("down",)]).pairs


def test_what_else_reads_the_producer_is_caught() -> None:
    first, second = toy()
    assert isinstance(first, Pair)
    assert isinstance(second, Pair)
    first, second = toy(leak="norm")
    assert isinstance(first, NoPair)
    assert first.reason == "norm feeds them and something else too: the block's output changes"
    assert isinstance(second, Pair)
    first, second = toy(leak="inner")
    assert isinstance(first, Pair)
    assert isinstance(second, NoPair)
    assert "up feeds them and something else too" in second.reason


def test_only_activations_that_commute_with_scales_pass() -> None:
    for activation, passes in ((nn.ReLU(), True), (nn.LeakyReLU(), True), (nn.GELU(), False), (nn.SiLU(), False)):
        assert isinstance(toy(activation=activation)[1], Pair) == passes


def test_a_norm_without_weight_is_named() -> None:
    found = toy(affine=False)[0]
    assert isinstance(found, NoPair)
    assert found.reason == "norm produces their input: no scale passes through it, and it has no weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_known_pairs_are_proven_on_the_block_itself(
    arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No probe is built for a block like the last one, and nothing of the block is changed."""
    block, call, hidden, groups = taken_apart(arch)
    known = find_pairs(block, call, hidden, groups)
    block, call, hidden, _ = taken_apart(arch, 1, dtype)
    before = copy.deepcopy(block.state_dict())
    if dtype != torch.float16:  # whose denormal numbers may ask for a probe
        monkeypatch.setattr(discovery, "Probe", None)
    again = find_pairs(block, call, hidden, groups, known)
    assert [pair.consumers for pair in again.pairs] == groups
    assert all(a is b for a, b in zip(known.pairs, again.pairs, strict=True) if isinstance(a, Pair))
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


def test_a_known_pair_that_does_not_hold_is_searched_for_again() -> None:
    block, call, hidden, groups = taken_apart("llama")
    wrong = KnownPairs("", (Pair("self_attn.k_proj", "rows", torch.arange(64) % 32, groups[1]),))
    found = find_pairs(block, call, hidden, groups, wrong).pairs
    assert found[1].producer == "self_attn.v_proj"  # type: ignore[union-attr]


@pytest.mark.parametrize("leak", ["norm", "inner"])
def test_a_known_pair_is_refused_in_a_block_that_leaks(leak: str) -> None:
    """The same modules and shapes, called by other code: the proof on the block itself must see it."""
    calls, hidden, groups = Call(0, (None,), {}), torch.randn(1, 16, HIDDEN), [("up",), ("down",)]
    known = find_pairs(Toy(nn.ReLU()), calls, hidden, groups)
    assert all(isinstance(pair, Pair) for pair in known.pairs)
    found = find_pairs(Toy(nn.ReLU(), leak), calls, hidden, groups, known).pairs
    assert [isinstance(pair, NoPair) for pair in found] == [leak == "norm", leak == "inner"]


def test_the_lack_of_a_pair_is_known_for_blocks_of_the_same_structure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    block, call, hidden, groups = taken_apart("olmo2")
    known = find_pairs(block, call, hidden, groups)
    assert any(isinstance(pair, NoPair) for pair in known.pairs)
    other = dataclasses.replace(known, structure="another")
    built = []
    probe = discovery.Probe
    monkeypatch.setattr(discovery, "Probe", lambda *given: built.append(given) or probe(*given))
    assert find_pairs(block, call, hidden, groups, known) == known
    assert not built
    find_pairs(block, call, hidden, groups, other)
    assert len(built) == 1


def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "pairs_table.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert (ROOT / "docs" / "pairs.md").read_text(encoding="utf-8") == printed
