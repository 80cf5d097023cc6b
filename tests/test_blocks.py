"""Finding, capturing, replaying and walking decoder blocks, on every architecture, against the model's own forward."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, closing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmq.blocks.replay as replay_module
from llmq.blocks.capture import Call, capture, find_blocks
from llmq.blocks.replay import Stage, elements_per_batch, fits_suspended, replay, staged, suspended_bytes
from llmq.blocks.topology import input_groups, linears
from llmq.errors import LlmqError
from llmq.hf.forward import shared_inputs
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
@pytest.mark.parametrize("suspend", [True, False])
def test_each_stage_sees_the_changes_of_the_stages_before_it(arch: str, suspend: bool) -> None:
    """Against the definition: run the block from its start for every stage, with the changes made so far."""
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    captured = capture(model, run(model), BATCHES)
    block, calls = blocks[1], captured.calls[1]
    hidden = replay(blocks[0], captured.calls[0], captured.hidden)
    groups = input_groups(block, calls[0], hidden[0])

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
    stages = [Stage.at(linears(block)[group[0]]) for group in groups]
    with closing(staged(block, calls, hidden, stages, suspend)) as runs:
        for group, inputs in zip(groups, runs, strict=False):
            seen += [x.clone() for (x,) in inputs]
            shrink(block, group)
        got = [y for (y,) in next(runs)]
    assert len(seen) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, outputs, strict=True))


@pytest.mark.parametrize("suspend", [True, False])
def test_inputs_that_the_caller_does_not_ask_for_change_nothing(suspend: bool) -> None:
    model = tiny_model("llama")
    block = find_blocks(model)[1][0]
    captured = capture(model, run(model), BATCHES)
    stages = [Stage.at(linears(block)[name]) for name in ("self_attn.o_proj", "mlp.down_proj")]
    with closing(staged(block, captured.calls[0], captured.hidden, stages, suspend)) as runs:
        next(next(runs))  # one batch of three
        next(runs)
        got = [y for (y,) in next(runs)]
    want = replay(block, captured.calls[0], captured.hidden)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("suspend", [True, False])
def test_an_error_of_the_caller_leaves_no_hook_and_no_suspended_forward(suspend: bool) -> None:
    block = InAutocast()
    hidden = [torch.randn(1, 4, 8) for _ in range(2)]
    calls = [Call(0, (None,), {})] * 2

    def fail() -> None:
        with closing(staged(block, calls, hidden, [Stage.at(block.a), Stage.at(block.c)], suspend)) as runs:
            for inputs in runs:
                next(inputs)
                raise LlmqError("stop here")

    with pytest.raises(LlmqError, match="stop here"):
        fail()
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not torch.is_autocast_enabled("cpu")


class InAutocast(nn.Module):
    """A block that runs its second linear inside a context manager of torch."""

    def __init__(self, mode: str = "autocast") -> None:
        super().__init__()
        self.a, self.b, self.c, self.mode = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), mode

    def context(self) -> AbstractContextManager[object]:
        if self.mode == "autocast":
            return torch.autocast("cpu", torch.bfloat16)
        return sdpa_kernel(SDPBackend.MATH) if self.mode == "sdpa" else torch.enable_grad()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with self.context():
            x = self.b(x)
        return self.c(x.float())


@pytest.mark.parametrize("mode", ["autocast", "sdpa", "enable_grad"])
def test_a_linear_inside_a_context_manager_is_replayed_rightly_and_the_context_is_left(mode: str) -> None:
    block = InAutocast(mode)
    hidden = [torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    calls = [Call(0, (None,), {})] * 3
    stages = [Stage.at(module) for module in (block.a, block.b, block.c)]
    found = {}
    for suspend in (True, False):
        with closing(staged(block, calls, hidden, stages, suspend)) as runs:
            found[suspend] = [[x for (x,) in inputs] for inputs in runs]
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    for mine, other in zip(found[True], found[False], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert torch.equal(found[True][-1][2], replay(block, calls, hidden)[2])


class Swapping(nn.Module):
    """A block that runs its linears in an order that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if float(x.sum()) > 0 else self.a(self.b(x))


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_linears_that_run_in_another_order_from_batch_to_batch_are_refused(order: tuple[str, str]) -> None:
    """Suspended forwards only: repeated ones would see no difference."""
    block = Swapping()
    hidden = [torch.ones(1, 2, 8), -torch.ones(1, 2, 8)]
    stages = [Stage.at(getattr(block, name)) for name in order]

    def use() -> None:
        with closing(staged(block, [Call(0, (None,), {})] * 2, hidden, stages, True)) as runs:
            for inputs in runs:
                list(inputs)

    with pytest.raises(LlmqError, match="run in a different order from call to call"):
        use()


def test_a_stop_that_does_not_run_is_refused_when_forwards_are_repeated() -> None:
    block = TwoLinears(0)
    runs = staged(block, [Call(0, (None,), {})], [torch.ones(1, 2, 8)], [Stage.at(block.b)], False)
    with closing(runs), pytest.raises(LlmqError, match="run in a different order"):
        list(next(runs))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, flat: Tensor) -> Tensor:
        y = torch.zeros_like(flat)
        chosen = flat[:, 0] > 0
        half = chosen.nonzero().flatten()
        for part in half.chunk(2):  # runs several times
            y[part] = self.experts[0](flat[part])
        y[~chosen] = self.experts[1](flat[~chosen])
        return y


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(8, 8), Router()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.router(self.first(x).reshape(-1, 8)).view(x.shape)


@pytest.mark.parametrize("suspend", [True, False])
def test_a_stage_observes_members_that_some_tokens_or_none_reach(suspend: bool) -> None:
    block = Experts()
    hidden = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    calls = [Call(0, (None,), {})] * 3
    stages = [Stage.at(block.first), Stage(block.router, tuple(block.router.experts))]
    with closing(staged(block, calls, hidden, stages, suspend)) as runs:
        list(next(runs))
        block.first.weight.data.mul_(0.5)
        routed = list(next(runs))
        outputs = [y for (y,) in next(runs)]
    for x, members, y in zip(hidden, routed, outputs, strict=True):
        flat = block.first(x).reshape(-1, 8)
        chosen = flat[:, 0] > 0
        assert torch.equal(members[0], flat[chosen])
        assert torch.equal(members[1], flat[~chosen])
        assert members[2].shape == (0, 8)
        assert torch.equal(y, block(x))
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_what_is_suspended_follows_the_memory_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    block = find_blocks(tiny_model("llama"))[1][0]
    hidden = [torch.zeros(2, 24, 64)]
    needed = suspended_bytes(block, hidden)
    assert needed == 2 * 24 * (2 * 64 + 128) * 4  # two hidden states of 64, and the input of down_proj
    for available, fits in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(replay_module, "available_bytes", lambda _, available=available: available)
        assert fits_suspended(block, hidden) == fits


def test_attention_probabilities_count_where_the_block_keeps_them() -> None:
    """BLOOM has no fused attention in transformers: 4 heads of [tokens, tokens] for each window."""
    fused, eager = (find_blocks(tiny_model(arch))[1][0] for arch in ("llama", "bloom"))
    for block, heads in ((fused, 0), (eager, 4)):
        widest = max(m.in_features for m in linears(block).values())
        assert elements_per_batch(block, 3, 50, 64) == 3 * 50 * (2 * 64 + widest + heads * 50)


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
    groups = input_groups(blocks[0], captured.calls[0][0], captured.hidden[0])
    assert sorted(tuple(sorted(g)) for g in groups) == sorted(tuple(sorted(g)) for g in GROUPS[arch])
    assert groups[-1][0] == GROUPS[arch][-1][0] or arch in ("cohere", "falcon"), "execution order"


class TwoLinears(nn.Module):
    """A block that runs one of its linears a chosen number of times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.a, self.b, self.times = nn.Linear(8, 8), nn.Linear(8, 8), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(self.times):
            x = self.b(x)
        return x


@pytest.mark.parametrize("times", [0, 2])
def test_linears_that_do_not_run_exactly_once_are_in_no_group(times: int) -> None:
    found = input_groups(TwoLinears(times), Call(0, (None,), {}), torch.randn(1, 2, 8))
    assert found == (("a",),)


class ReadsAWeight(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.b.weight.dtype))


def test_a_linear_whose_weight_other_code_reads_is_in_no_group() -> None:
    block = ReadsAWeight(1)
    assert input_groups(block, Call(0, (None,), {}), torch.randn(1, 2, 8)) == (("a",),)
    assert type(block.b) is nn.Linear


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
    assert captured.hidden == ()
    good = Meddler(False, as_tuple)
    assert len(capture(good, good, BATCHES[:1]).calls) == 3
    bad = Meddler(True, as_tuple)
    with pytest.raises(LlmqError, match="the model changes them in between"):
        capture(bad, bad, BATCHES[:1])


def test_a_captured_call_holds_no_cache() -> None:
    """A replayed block must neither see nor extend what an earlier call left."""
    model = tiny_model("llama")
    block = find_blocks(model)[1][0]
    captured = capture(model, lambda ids: model.base_model(input_ids=ids, use_cache=True), BATCHES[:1])
    call = captured.calls[0][0]
    assert not any(hasattr(value, "get_seq_length") for value in (*call.args, *call.kwargs.values()))
    first, second = (replay(block, [call], captured.hidden)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_groups_of_a_whole_model_are_found_without_data(arch: str) -> None:
    model = tiny_model(arch)
    prefix, blocks = find_blocks(model)
    names = [f"{prefix}.{i}" for i in range(len(blocks))]
    captured = capture(model, run(model), BATCHES[:1])
    want = {
        name: input_groups(block, captured.calls[i][0], captured.hidden[0])
        for i, (name, block) in enumerate(zip(names, blocks, strict=True))
    }
    assert shared_inputs(model, names) == want
    model.to("meta")
    assert shared_inputs(model, names) == want


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(LlmqError, match="holds no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))


class Returning(nn.Module):
    """A block that returns its hidden states and `beside`."""

    def __init__(self, beside: int) -> None:
        super().__init__()
        self.linear, self.beside = nn.Linear(8, 8), beside

    def forward(self, x: Tensor, given: Any = None) -> Any:
        return (self.linear(x), *range(self.beside)) if self.beside else self.linear(x)


class Unpacking(nn.Module):
    """A model whose blocks return tuples of one length, which it takes apart; it may hand on what lies beside."""

    def __init__(self, beside: int, hand_on: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Returning(beside), Returning(beside)])
        self.beside, self.hand_on = beside, hand_on

    def forward(self, x: Tensor) -> Tensor:
        rest: list[Any] = [None]
        for layer in self.layers:
            result = layer(x, rest[0] if self.hand_on else None)
            if self.beside:
                x, *rest = result
                if len(rest) != self.beside:
                    raise ValueError("not enough values to unpack")
            else:
                x = result
        return x


@pytest.mark.parametrize("beside", [0, 1, 2])
def test_blocks_may_return_tuples_of_any_length(beside: int) -> None:
    model = Unpacking(beside)
    x = torch.randn(1, 3, 8)
    captured = capture(model, model, [x])
    assert torch.equal(replay(model.layers[0], captured.calls[0], captured.hidden)[0], model.layers[0].linear(x))


def test_what_blocks_hand_to_each_other_beside_the_hidden_states_is_refused() -> None:
    model = Unpacking(1, hand_on=True)
    with pytest.raises((LlmqError, ValueError)):
        capture(model, model, [torch.randn(1, 3, 8)])
