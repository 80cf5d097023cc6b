"""Fused linears: the same outputs as unfused ones, nothing else changed, and what cannot be fused."""

from __future__ import annotations

import copy
import io
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.core.grid import Grid
from llmq.errors import LlmqError
from llmq.hf.text_decoder import text_decoder
from llmq.serving.fused import FusedLinears, fuse_linears, fused_linears, shared_inputs
from llmq.serving.linear import QuantLinear
from tests.fixtures import BF16, DISK, IDS, K, checkpoint, logits, quantized_weight, rows, with_run
from tests.tiny import ARCHITECTURES

SIZES = (48, 16, 32)


class Three(nn.Module):
    """Query, key and value of one input, as a model's attention calls them."""

    def __init__(self, grid: Grid, bias: bool = False, kernel: str | None = None) -> None:
        super().__init__()
        for index, (name, out) in enumerate(zip("qkv", SIZES, strict=True)):
            drawn = torch.randn(out, generator=torch.Generator().manual_seed(out)).to(BF16) if bias else None
            weight = quantized_weight(grid, rows=out, seed=index)
            self.add_module(name, QuantLinear.from_quantized(weight, drawn, kernel))

    def forward(self, input_ids: Tensor | None = None, use_cache: bool = False, x: Tensor | None = None) -> Tensor:
        if x is None:
            assert input_ids is not None
            x = torch.zeros(*input_ids.shape, K)
        return torch.cat((self.q(x), self.k(x), self.v(x)), -1)


def three(grid: Grid | None = None, **options: object) -> tuple[Three, FusedLinears]:
    module = Three(grid or Grid(4, 32, True), **options)  # type: ignore[arg-type]
    (group,) = fuse_linears(module)
    return module, group


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_one_matmul_gives_the_same_bits(
    bits: int, symmetric: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(bits, 32, symmetric)
    calls: list[torch.Size] = []
    recording = with_run(lambda kernel: lambda *args: calls.append(args[0].shape) or kernel.run(*args))
    monkeypatch.setattr(QuantLinear, "kernels", recording)
    module, group = three(grid, bias=bias)
    with torch.no_grad():
        for shape in ((1,), (2, 3), (0,)):
            x = rows(*shape)
            calls.clear()
            got = module(x=x)
            assert len(calls) == 1
            assert group.pending is None, "every output was taken"
            assert torch.equal(got, Three(grid, bias=bias)(x=x))
    assert all(member._layouts == {} for member in group.members), "the shared layout replaces their own"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fusing_changes_no_bit_on_any_architecture(tmp_path: Path, arch: str) -> None:
    folder = checkpoint(tmp_path / "a", arch)
    plain, fused = llmq.load(folder), llmq.load(folder, fuse=True)
    for ids in (IDS[:1, :1], IDS[:1]):
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, fused(ids).logits)
    groups = [group.names for group in fused_linears(fused)]
    if arch in ("llama", "qwen2", "gemma3_text", "cohere"):
        assert [name.rpartition(".")[2] for names in groups[:2] for name in names] == [
            *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        ]
        assert len(groups) == 8
    if arch in ("gpt_neox", "bloom", "falcon"):
        assert groups == [], "their query, key and value are one linear"
    assert all(group.pending is None for group in fused_linears(fused))
    written = [m.generate(IDS[:1], max_new_tokens=6, do_sample=False) for m in (plain, fused)]
    assert torch.equal(*written)


def test_a_fused_model_saves_moves_copies_and_loads_like_an_unfused_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", "qwen2")
    plain, fused = llmq.load(folder), llmq.load(folder, fuse=True)
    want = logits(plain)
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    fused.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(llmq.load(tmp_path / "b")), want)
    copied = copy.deepcopy(fused)
    assert torch.equal(logits(copied), want)
    assert not {id(m) for group in fused_linears(copied) for m in group.members} & {id(m) for m in fused.modules()}
    state = llmq.load(checkpoint(tmp_path / "c", "qwen2", scales="search"))
    fused.load_state_dict(state.state_dict())
    assert torch.equal(logits(fused), logits(state)), "layouts are rebuilt after loading"
    assert torch.equal(logits(copied), want)
    half = copied.to(torch.float16)
    torch.testing.assert_close(logits(half).float(), logits(plain.to(torch.float16)).float(), rtol=1e-2, atol=1e-2)
    file = io.BytesIO()
    torch.save(fused_linears(fused)[0].members[0], file)
    file.seek(0)
    torch.load(file, weights_only=False)


def test_linears_are_called_in_any_order_and_again() -> None:
    module, _ = three()
    unfused, x, y = Three(Grid(4, 32, True)), rows(2), rows(3)
    with torch.no_grad():
        want = {(name, i): getattr(unfused, name)(t) for name in "qkv" for i, t in enumerate((x, y))}
        for order in ("vkq", "qqkkvv", "kvkvq", "v"):
            for name in order:
                assert torch.equal(getattr(module, name)(x), want[name, 0])
        assert torch.equal(module.k(y), want["k", 1]), "another input"
        assert torch.equal(module.q(x), want["q", 0])
        x.mul_(2)
        assert torch.equal(module.v(x), unfused.v(x)), "a changed input is noticed"
        assert torch.equal(module.v(x.clone()), unfused.v(x))
    assert torch.equal(module.k(rows(60)), unfused.k(rows(60))), "with many rows each linear runs alone"
    few = rows(2).requires_grad_()
    module(x=few).float().sum().backward()
    other = rows(2).requires_grad_()
    unfused(x=other).float().sum().backward()
    assert torch.equal(few.grad, other.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_a_linear_called_alone_releases_its_input_and_the_other_outputs(mode: type) -> None:
    module, group = three()
    with mode():
        x = rows(2)
        module.q(x)
        assert group.pending is not None
        kept = [weakref.ref(x), *(weakref.ref(y) for y in group.pending[2].values())]
        assert len(kept) == 3
        del x
    assert [reference() for reference in kept] == [None] * 3
    assert group.pending is None


def test_an_input_freed_late_does_not_drop_the_outputs_of_the_next() -> None:
    module, group = three()
    with torch.no_grad():
        first, second = rows(2), rows(3)
        module.q(first)
        module.q(second)
        pending = group.pending
        del first
        assert group.pending is pending
        assert torch.equal(module.k(second), Three(Grid(4, 32, True)).k(second))


def test_threads_do_not_share_outputs() -> None:
    module, _ = three()
    unfused, wrong = Three(Grid(4, 32, True)), []

    def work(seed: int) -> None:
        x = torch.randn(1, K, generator=torch.Generator().manual_seed(seed)).to(BF16)
        with torch.no_grad():
            want = unfused(x=x)
            wrong.extend(1 for _ in range(200) if not torch.equal(module(x=x), want))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_it_compiles_into_one_matmul(bias: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph.code)
        return graph

    module, group = three(bias=bias)
    compiled = torch.compile(module, fullgraph=True, backend=keep)
    with torch.no_grad():
        unfused = Three(Grid(4, 32, True), bias=bias)(x=rows(1))
        assert torch.allclose(compiled(x=rows(1)), unfused, rtol=2e-2, atol=0.1), "without a layout"
        group.stacked.ready(BF16)
        for _ in range(3):
            assert torch.equal(compiled(x=rows(1)), unfused)
    assert graphs[-1].count("int4pack_mm") == 1
    assert len(graphs) == 2
    assert group.pending is None


def test_a_fused_model_compiles_into_one_graph(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = llmq.load(checkpoint(tmp_path / "a"), fuse=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :1]):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=2e-2, atol=2e-2)


def test_linears_that_cannot_be_fused_are_refused(tmp_path: Path) -> None:
    changes = [
        (QuantLinear.from_quantized(quantized_weight(Grid(8, 32, True))), "bits, groups or symmetry differ"),
        (QuantLinear.from_quantized(quantized_weight(Grid(4, 32, True), torch.float16)), "scale dtypes differ"),
        (
            QuantLinear.from_quantized(quantized_weight(Grid(4, 32, True)), torch.ones(48)),
            "some have a bias and others do not",
        ),
        (
            QuantLinear.from_quantized(quantized_weight(Grid(4, 32, True)), kernel="slab"),
            "they are forced onto different kernels",
        ),
    ]
    for other, reason in changes:
        module = Three(Grid(4, 32, True))
        module.k = other
        with pytest.raises(LlmqError, match=f"q, k, v cannot be fused: {reason}.*load without fuse"):
            fuse_linears(module)
        assert module.q.fusion is None
    folder = checkpoint(tmp_path / "a")
    layers = {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    with pytest.raises(LlmqError, match=r"model.layers.2.self_attn.q_proj is offloaded.*load without fuse"):
        llmq.load(folder, fuse=True, device_map={**DISK, **layers}, offload_folder=tmp_path / "off")


def test_finding_shared_inputs_leaves_the_model_unchanged(tmp_path: Path) -> None:
    model = llmq.load(checkpoint(tmp_path / "a"), device_map="auto")
    want, before = logits(model), [set(vars(module)) for module in model.modules()]
    decoder = text_decoder(model.config, model).module
    assert len(shared_inputs(model)) == 8
    assert shared_inputs(model, decoder) == shared_inputs(model)
    assert [set(vars(module)) for module in model.modules()] == before
    fuse_linears(model)
    fuse_linears(model)
    assert torch.equal(logits(model), want)
