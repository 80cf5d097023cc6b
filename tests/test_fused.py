"""Linears that read one input, run as one: the same outputs, nothing else changed, and what cannot be joined."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.core.grid import Grid
from llmq.errors import LlmqError
from llmq.serving.fused import Joined, join, joined_linears, shared_inputs
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


def three(grid: Grid | None = None, **options: object) -> tuple[Three, Joined]:
    module = Three(grid or Grid(4, 32, True), **options)  # type: ignore[arg-type]
    (joined,) = join(module)
    return module, joined


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
    module, joined = three(grid, bias=bias)
    with torch.no_grad():
        for shape in ((1,), (2, 3), (0,)):
            x = rows(*shape)
            calls.clear()
            got = module(x=x)
            assert len(calls) == 1
            assert joined.left is None, "nothing is kept"
            assert torch.equal(got, Three(grid, bias=bias)(x=x))
    assert all(member._layouts == {} for member in joined.members), "one layout in the place of three"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_says_the_same_fused(tmp_path: Path, arch: str) -> None:
    folder = checkpoint(tmp_path / "a", arch)
    plain, fused = llmq.load(folder), llmq.load(folder, fuse=True)
    for ids in (IDS[:1, :1], IDS[:1]):
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, fused(ids).logits)
    groups = [joined.names for joined in joined_linears(fused)]
    if arch in ("llama", "qwen2", "gemma3_text", "cohere"):
        assert [name.rpartition(".")[2] for names in groups[:2] for name in names] == [
            *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        ]
        assert len(groups) == 8
    if arch in ("gpt_neox", "bloom", "falcon"):
        assert groups == [], "one linear is what they have"
    assert all(joined.left is None for joined in joined_linears(fused))
    written = [m.generate(IDS[:1], max_new_tokens=6, do_sample=False) for m in (plain, fused)]
    assert torch.equal(*written)


def test_a_fused_model_saves_moves_copies_and_loads_as_any(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", "qwen2")
    plain, fused = llmq.load(folder), llmq.load(folder, fuse=True)
    want = logits(plain)
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    fused.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(llmq.load(tmp_path / "b")), want)
    twin = copy.deepcopy(fused)
    assert torch.equal(logits(twin), want)
    assert not {id(m) for j in joined_linears(twin) for m in j.members} & {id(m) for m in fused.modules()}
    state = llmq.load(checkpoint(tmp_path / "c", "qwen2", scales="search"))
    fused.load_state_dict(state.state_dict())
    assert torch.equal(logits(fused), logits(state)), "layouts follow what is loaded"
    assert torch.equal(logits(twin), want)
    half = twin.to(torch.float16)
    torch.testing.assert_close(logits(half).float(), logits(plain.to(torch.float16)).float(), rtol=1e-2, atol=1e-2)
    file = io.BytesIO()
    torch.save(joined_linears(fused)[0].members[0], file)
    file.seek(0)
    torch.load(file, weights_only=False)


def test_whoever_is_called_first_and_whatever_is_called_again() -> None:
    module, _ = three()
    alone, x, y = Three(Grid(4, 32, True)), rows(2), rows(3)
    with torch.no_grad():
        want = {(name, i): getattr(alone, name)(t) for name in "qkv" for i, t in enumerate((x, y))}
        for order in ("vkq", "qqkkvv", "kvkvq", "v"):
            for name in order:
                assert torch.equal(getattr(module, name)(x), want[name, 0])
        assert torch.equal(module.k(y), want["k", 1]), "another input"
        assert torch.equal(module.q(x), want["q", 0])
        x.mul_(2)
        assert torch.equal(module.v(x), alone.v(x)), "a changed input is noticed"
        assert torch.equal(module.v(x.clone()), alone.v(x))
    assert torch.equal(module.k(rows(60)), alone.k(rows(60))), "many rows run one by one"
    few = rows(2).requires_grad_()
    module(x=few).float().sum().backward()
    other = rows(2).requires_grad_()
    alone(x=other).float().sum().backward()
    assert torch.equal(few.grad, other.grad)


def test_threads_do_not_see_each_other() -> None:
    module, _ = three()
    alone, wrong = Three(Grid(4, 32, True)), []

    def work(seed: int) -> None:
        x = torch.randn(1, K, generator=torch.Generator().manual_seed(seed)).to(BF16)
        with torch.no_grad():
            want = alone(x=x)
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

    module, joined = three(bias=bias)
    compiled = torch.compile(module, fullgraph=True, backend=keep)
    with torch.no_grad():
        alone = Three(Grid(4, 32, True), bias=bias)(x=rows(1))
        assert torch.allclose(compiled(x=rows(1)), alone, rtol=2e-2, atol=0.1), "before there is a layout"
        joined.whole.ready(BF16)
        for _ in range(3):
            assert torch.equal(compiled(x=rows(1)), alone)
    assert graphs[-1].count("int4pack_mm") == 1
    assert len(graphs) == 2
    assert joined.left is None


def test_a_fused_model_compiles_whole(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = llmq.load(checkpoint(tmp_path / "a"), fuse=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :1]):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=2e-2, atol=2e-2)


def test_what_cannot_be_joined_is_said(tmp_path: Path) -> None:
    changes = [
        (QuantLinear.from_quantized(quantized_weight(Grid(8, 32, True))), "different bits, groups or symmetry"),
        (QuantLinear.from_quantized(quantized_weight(Grid(4, 32, True), torch.float16)), "scales of different dtypes"),
        (QuantLinear.from_quantized(quantized_weight(Grid(4, 32, True)), torch.ones(48)), "partly with a bias"),
        (
            QuantLinear.from_quantized(quantized_weight(Grid(4, 32, True)), kernel="slab"),
            "forced onto different kernels",
        ),
    ]
    for other, reason in changes:
        module = Three(Grid(4, 32, True))
        module.k = other
        with pytest.raises(LlmqError, match=f"q, k, v cannot be fused: they .*{reason}.*load without fuse"):
            join(module)
        assert module.q.together is None
    folder = checkpoint(tmp_path / "a")
    layers = {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    with pytest.raises(LlmqError, match=r"model.layers.2.self_attn.q_proj is offloaded.*load without fuse"):
        llmq.load(folder, fuse=True, device_map={**DISK, **layers}, offload_folder=tmp_path / "off")


def test_finding_what_is_shared_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = llmq.load(checkpoint(tmp_path / "a"), device_map="auto")
    want, before = logits(model), [set(vars(module)) for module in model.modules()]
    assert len(shared_inputs(model)) == 8
    assert [set(vars(module)) for module in model.modules()] == before
    join(model)
    join(model)
    assert torch.equal(logits(model), want)
