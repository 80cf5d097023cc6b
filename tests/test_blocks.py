"""Finding, capturing, replaying and walking decoder blocks, on every architecture, against the model's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from llmq.blocks.capture import Call, capture, find_blocks
from llmq.blocks.replay import replay, walk
from llmq.blocks.topology import input_groups, linears
from llmq.errors import LlmqError
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

BATCHES = [torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(s)) for s in range(3)]


def run(model: nn.Module):  # type: ignore[no-untyped-def]
    return lambda ids: model.base_model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_replaying_every_block_gives_the_models_own_hidden_states(arch: str) -> None:
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    assert len(blocks) == 4
    expected: dict[int, list[Tensor]] = {i: [] for i in range(4)}
    handles = [
        block.register_forward_hook(
            lambda _, __, out, i=i: expected[i].append(out if isinstance(out, Tensor) else out[0])
        )
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        for ids in BATCHES:
            run(model)(ids)
    for handle in handles:
        handle.remove()
    before = list(blocks)
    captured = capture(model, run(model), BATCHES)
    assert all(a is b for a, b in zip(blocks, before, strict=True)), "the blocks are put back"
    hidden = captured.hidden
    for index, block in enumerate(blocks):
        hidden = replay(block, captured.calls[index], hidden)
        for got, want in zip(hidden, expected[index], strict=True):
            assert torch.equal(got, want), f"block {index}"


def test_blocks_of_different_layer_types_get_their_own_arguments() -> None:
    model = tiny_model("gemma3_text")
    captured = capture(model, run(model), BATCHES[:1])
    masks = [call[0].kwargs["attention_mask"] for call in captured.calls]
    assert masks[1] is None or not torch.equal(masks[0], masks[1])


def test_equal_arguments_of_batches_are_stored_once() -> None:
    model = tiny_model("llama")
    captured = capture(model, run(model), BATCHES)
    tables = [call.kwargs["position_embeddings"][0] for calls in captured.calls for call in calls]
    assert len({id(table) for table in tables}) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("paused", [True, False])
def test_walk_sees_each_gate_after_the_changes_before_it(arch: str, paused: bool) -> None:
    """Against the definition: run the block from its start for every gate, with the changes made so far."""
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    captured = capture(model, run(model), BATCHES)
    block, calls = blocks[1], captured.calls[1]
    hidden = replay(blocks[0], captured.calls[0], captured.hidden)
    names = list(linears(block))
    groups = input_groups(block, calls[0], hidden[0], names)

    def shrink(target: nn.Module, group: tuple[str, ...]) -> None:
        for name in group:
            linears(target)[name].weight.data.mul_(0.9)

    slow = copy.deepcopy(block)
    wanted: list[Tensor] = []
    for group in groups:
        handle = linears(slow)[group[0]].register_forward_pre_hook(lambda _, x: wanted.append(x[0].clone()))
        replay(slow, calls, hidden)
        handle.remove()
        shrink(slow, group)
    outputs = replay(slow, calls, hidden)

    seen: list[Tensor] = []
    gates = [linears(block)[group[0]] for group in groups]
    with torch.no_grad():
        got = walk(
            block,
            calls,
            list(hidden),
            gates,
            lambda g, x: seen.append(x.clone()),
            lambda g: shrink(block, groups[g]),
            paused,
        )
    assert len(seen) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, outputs, strict=True))


def test_an_error_inside_a_walk_reaches_the_caller_and_leaves_no_hook() -> None:
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    captured = capture(model, run(model), BATCHES)
    gate = linears(blocks[0])["mlp.down_proj"]

    def fail(_: int) -> None:
        raise LlmqError("stop here")

    for paused in (True, False):
        with pytest.raises(LlmqError, match="stop here"):
            walk(blocks[0], captured.calls[0], captured.hidden, [gate], lambda g, x: None, fail, paused)
    assert not gate._forward_pre_hooks


GROUPS = {
    "llama": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)],
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "cohere": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
               ("self_attn.o_proj",), ("mlp.down_proj",)],
    "falcon": [("self_attention.query_key_value", "mlp.dense_h_to_4h"), ("self_attention.dense",),
               ("mlp.dense_4h_to_h",)],
    "opt": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)],
}  # fmt: skip


@pytest.mark.parametrize("arch", GROUPS)
def test_linears_are_grouped_by_the_input_they_share(arch: str) -> None:
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    captured = capture(model, run(model), BATCHES[:1])
    groups = input_groups(blocks[0], captured.calls[0][0], captured.hidden[0], list(linears(blocks[0])))
    assert sorted(tuple(sorted(g)) for g in groups) == sorted(tuple(sorted(g)) for g in GROUPS[arch])
    assert groups[-1][0] == GROUPS[arch][-1][0] or arch in ("cohere", "falcon"), "execution order"


class TwoLinears(nn.Module):
    """A block that runs one of its linears as often as it is told."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.a, self.b, self.times = nn.Linear(8, 8), nn.Linear(8, 8), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(self.times):
            x = self.b(x)
        return x


@pytest.mark.parametrize("times", [0, 2])
def test_linears_that_are_not_needed_may_run_as_they_like(times: int) -> None:
    found = input_groups(TwoLinears(times), Call(0, (None,), {}), torch.randn(1, 2, 8), ["a", "b"], ["a"])
    assert found == [("a",)]


@pytest.mark.parametrize("times", [0, 2])
def test_linears_that_do_not_run_exactly_once_are_refused(times: int) -> None:
    with pytest.raises(LlmqError, match=f"b of TwoLinears runs {times} times in one forward"):
        input_groups(TwoLinears(times), Call(0, (None,), {}), torch.randn(1, 2, 8), ["a", "b"])


class Meddler(nn.Module):
    """A decoder that does something to the hidden states between its blocks."""

    def __init__(self, meddle: bool, as_tuple: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList(TwoLinears(1) for _ in range(3))
        self.meddle, self.as_tuple = meddle, as_tuple

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
            x = x[0] if self.as_tuple else x
            x = x * 2 if self.meddle else x
        return x


@pytest.mark.parametrize("as_tuple", [True, False])
def test_models_that_change_hidden_states_between_blocks_are_refused(as_tuple: bool) -> None:
    captured = capture(Meddler(False, as_tuple), Meddler(False, as_tuple), BATCHES[:0])
    assert captured.hidden == []
    good = Meddler(False, as_tuple)
    assert len(capture(good, good, BATCHES[:1]).calls) == 3
    bad = Meddler(True, as_tuple)
    with pytest.raises(LlmqError, match="the model changes them in between"):
        capture(bad, bad, BATCHES[:1])


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(LlmqError, match="holds no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))
