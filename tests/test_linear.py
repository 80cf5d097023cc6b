"""`QuantLinear`: a drop-in for a linear whose state is the stored tensors and nothing else."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from llmq.core.grid import Grid
from llmq.core.scheme import ActivationGrid, Scheme
from llmq.errors import LlmqError
from llmq.formats import IN_MEMORY
from llmq.kernels import cpu_int4, slab
from llmq.serving.linear import QuantLinear
from tests.fixtures import BF16, K, N, quantized_weight, rows

F16, F32 = torch.float16, torch.float32


def linear(grid: Grid | None = None, dtype: torch.dtype = BF16, bias: bool = True, **kwargs: Any) -> QuantLinear:
    grid = grid or Grid(4, 32, True)
    drawn = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
    return QuantLinear.from_quantized(quantized_weight(grid, dtype), drawn if bias else None, **kwargs)


def dense_linear(module: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(K, N, bias=module.bias is not None, dtype=dtype)
    dense.weight.data = module.dequantize(dtype)
    if module.bias is not None:
        dense.bias.data = module.bias.detach().to(dtype)
    return dense


GRIDS = [Grid(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (32, None) for symmetric in (True, False)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_it_computes_what_a_dense_linear_does(grid: Grid, dtype: torch.dtype) -> None:
    module = linear(grid)
    dense = dense_linear(module, dtype)
    for shape in ((), (1,), (0,), (2, 3), (2, 0, 3), (70,)):
        x = rows(*shape, dtype=dtype)
        with torch.no_grad():
            got, want = module(x), dense(x)
        assert got.dtype == dtype
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == F32 else 2e-2, atol=1e-4 if dtype == F32 else 0.2)


def test_state_is_the_stored_tensors_before_and_after_use() -> None:
    weight = quantized_weight(Grid(4, 32, False))
    module = QuantLinear.from_quantized(weight)
    with torch.no_grad():
        module(rows(1))
        module(rows(100))
    stored = IN_MEMORY.encode(weight)
    assert set(module.state_dict()) == set(stored)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in stored.items())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert isinstance(module, nn.Linear)
    again = module.quantized_weight()
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert torch.equal(again.zero, weight.zero)
    assert torch.equal(module.dequantize(F32), weight.dequantize(F32))


def test_on_meta_it_declares_the_stored_tensors() -> None:
    scheme = Scheme(Grid(4, 32, False), None, F16)
    module = QuantLinear(K, N, scheme, bias=F32, device="meta")
    declared = {name: (t.dtype, tuple(t.shape)) for name, t in module.named_parameters()}
    specs = {name: (spec.dtype, spec.shape) for name, spec in IN_MEMORY.specs((N, K), scheme).items()}
    assert declared == specs | {"bias": (F32, (N,))}
    assert all(parameter.is_meta for parameter in module.parameters())
    assert repr(module) == "QuantLinear(96, 48, bias=True, int4 asymmetric, groups of 32)"


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.double(),
        lambda module: module.to(F16),
        lambda module: module.to(torch.device("cpu"), F16),
        lambda module: nn.Sequential(module).half()[0],
    ],
)
def test_casts_reach_the_bias_and_not_the_scales(cast: Any) -> None:
    module = linear()
    scale, bias = module.weight_scale.clone(), module.bias.clone()
    cast(module)
    assert module.weight_scale.dtype == BF16
    assert torch.equal(module.weight_scale, scale)
    assert module.weight_packed.dtype == torch.int32
    assert module.weight_shape.dtype == torch.int64
    assert module.bias.dtype != BF16
    assert torch.equal(module.bias, bias.to(module.bias.dtype))


def test_moves_reach_everything() -> None:
    module = linear(Grid(4, 32, False)).to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.weight_scale.dtype == BF16


def test_layouts_are_made_once_and_dropped_when_a_tensor_changes() -> None:
    module, x = linear(bias=False), rows(1)
    with torch.no_grad():
        first = module(x)
        made = module._cached_layout(cpu_int4.KERNEL)
        assert made is not None
        module.to("cpu")
        module(x)
        assert module._cached_layout(cpu_int4.KERNEL) is made, "a move to the same device keeps the layout"
        other = QuantLinear.from_quantized(quantized_weight(Grid(4, 32, True), seed=5))
        module.load_state_dict(other.state_dict())
        assert module._cached_layout(cpu_int4.KERNEL) is None
        assert torch.equal(module(x), other(x))
        assert not torch.equal(module(x), first)
        module.weight_packed = nn.Parameter(linear(bias=False).weight_packed.data, requires_grad=False)
        module.weight_scale = nn.Parameter(linear(bias=False).weight_scale.data, requires_grad=False)
        assert torch.equal(module(x), first), "replaced tensors are noticed"
        uneven = QuantLinear.from_quantized(quantized_weight(Grid(4, 32, False)))
        before = uneven(x)
        zeros = QuantLinear.from_quantized(quantized_weight(Grid(4, 32, False), seed=5)).weight_zero_point
        uneven.weight_zero_point = nn.Parameter(zeros.data, requires_grad=False)
        assert not torch.equal(uneven(x), before), "and so are replaced zero points"
        module._apply(torch.clone)  # new data in the same parameters
        assert module._cached_layout(cpu_int4.KERNEL) is None


def test_the_number_of_rows_decides_in_a_forward() -> None:
    most = cpu_int4.MAX_ROWS
    with torch.no_grad():
        outputs = {name: linear(kernel=name)(rows(most + 1)) for name in ("cpu_int4", "slab")}
        assert not torch.equal(*outputs.values())
        assert torch.equal(linear()(rows(most + 1)), outputs["slab"])
        assert torch.equal(linear()(rows(most + 1)[:most]), outputs["cpu_int4"][:most])


def test_offloaded_weights_get_no_cached_layout() -> None:
    module, x = linear(), rows(1)
    module.offloaded = True
    with torch.no_grad():
        torch.testing.assert_close(module(x), linear()(x), rtol=2e-2, atol=0.1)
    assert module._layouts == {}
    assert module.choice(BF16, 1).kernel is slab.KERNEL


def test_copies_and_pickles_hold_only_the_stored_tensors() -> None:
    module, x = linear(), rows(3)
    with torch.no_grad():
        want = module(x)
        file = io.BytesIO()
        torch.save(module, file)
        size = sum(parameter.nbytes for parameter in module.parameters())
        assert file.tell() < size + 6000
        file.seek(0)
        for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
            assert other._layouts == {}
            assert torch.equal(other(x), want)
            assert other.weight_packed.data_ptr() != module.weight_packed.data_ptr()


def test_a_layout_made_in_inference_mode_works_outside_it() -> None:
    module = linear(bias=False)
    with torch.inference_mode():
        module(rows(1))
        module(rows(60))
    assert not module._cached_layout(cpu_int4.KERNEL).weight.is_inference()
    x = rows(60, dtype=BF16).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        module(rows(1))


@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(8, None, False)], ids=str)
def test_gradients_reach_the_input(grid: Grid) -> None:
    module = linear(grid, F32)
    x = rows(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)
    few = rows(1).requires_grad_()
    linear(grid)(few).float().pow(2).sum().backward()
    dense = dense_linear(linear(grid), BF16)
    other = rows(1).requires_grad_()
    dense(other).float().pow(2).sum().backward()
    torch.testing.assert_close(few.grad, other.grad, rtol=3e-2, atol=1.0)


@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(8, None, False)], ids=str)
def test_requiring_a_gradient_does_not_change_the_output(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = linear(grid, bias=True), rows(2)
    with torch.no_grad():
        want = module(x)
    monkeypatch.setattr(slab, "_multiply", None)  # fails if slab runs instead of the kernel for few rows
    got = module(x.clone().requires_grad_())
    assert torch.equal(got, want)
    monkeypatch.undo()
    few = rows(2).float().requires_grad_()
    (first,) = torch.autograd.grad(module(few.bfloat16()).float().pow(2).sum(), few, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), few)  # 2 W^T W 1
    weight = module.dequantize(F32)
    torch.testing.assert_close(second, (2 * (weight.sum(1) @ weight)).expand(2, -1), rtol=3e-2, atol=1.0)


def test_it_runs_in_the_dtype_of_autocast() -> None:
    module, plain = linear(Grid(4, 32, True), bias=True), nn.Linear(K, N)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(rows(2).float()).dtype == plain(rows(2).float()).dtype == BF16
        assert torch.equal(module(rows(2).float()), module(rows(2)))
        assert module(rows(2).double()).dtype == torch.float64
    with torch.no_grad():
        assert module(rows(2).float()).dtype == F32


@pytest.mark.parametrize("default", [BF16, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", [None, "slab", "reference"])
def test_torchs_default_dtype_changes_nothing(default: torch.dtype, kernel: str | None) -> None:
    weight, x = quantized_weight(Grid(4, 32, False)), rows(2)
    results = []
    for dtype in (F32, default):
        torch.set_default_dtype(dtype)
        try:
            module = QuantLinear.from_quantized(weight, kernel=kernel)
            results.append((module(x), module.dequantize(), *module.state_dict().values()))
        finally:
            torch.set_default_dtype(F32)
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_an_input_that_is_not_floating_or_on_another_device_is_refused() -> None:
    module = linear(Grid(4, 32, True))
    for x, message in (
        (torch.ones(1, K, dtype=torch.int64), "must be floating; got torch.int64"),
        (torch.ones(1, K, dtype=torch.bool), "must be floating; got torch.bool"),
        (rows(1).to("meta"), "must be on one device; the weight is on cpu, x on meta"),
    ):
        with pytest.raises(LlmqError, match=message):
            module(x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_compiles_into_one_graph_and_uses_existing_layouts(symmetric: bool) -> None:
    torch._dynamo.reset()
    module = nn.Sequential(linear(Grid(4, 32, symmetric)), nn.SiLU(), nn.Linear(N, K, dtype=BF16))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        got = compiled(rows(1))
        assert module[0]._cached_layout(cpu_int4.KERNEL) is None, "a compiled forward makes no layout"
        torch.testing.assert_close(got, module(rows(1)), rtol=2e-2, atol=0.1)
        module[0].ready(BF16)
        for x in (rows(1), rows(2, 30), rows(3, 40), rows(1)):
            assert torch.equal(compiled(x), module(x))
        module[0].load_state_dict(linear(Grid(4, 32, symmetric), bias=True).state_dict())
        torch.testing.assert_close(compiled(rows(1)), module(rows(1)), rtol=2e-2, atol=0.1)
    x = rows(60).requires_grad_()
    compiled(x).float().sum().backward()
    other = rows(60).requires_grad_()
    module(other).float().sum().backward()
    assert torch.equal(x.grad, other.grad)
    few = rows(2).requires_grad_()  # eager it is the int4 op, compiled the slab path
    compiled(few).float().sum().backward()
    other = rows(2).requires_grad_()
    module(other).float().sum().backward()
    torch.testing.assert_close(few.grad, other.grad, rtol=2e-2, atol=0.1)


def test_a_forced_kernel_runs_or_is_refused_with_its_reason() -> None:
    x = rows(2)
    with torch.no_grad():
        torch.testing.assert_close(linear(kernel="reference")(x), linear(kernel="slab")(x), rtol=2e-2, atol=0.1)
        with pytest.raises(LlmqError, match="cpu_int4 requires group_size divisible by 32; got 24"):
            linear(Grid(4, 24, True), kernel="cpu_int4")(x)
    with pytest.raises(LlmqError, match=r"the last dimension of the input must be 96; got \[2, 95\]"):
        linear()(x[:, 1:])


def test_quantized_activations_are_refused() -> None:
    scheme = Scheme(Grid(8, None, True), ActivationGrid(8, "token", symmetric=True, dynamic=True), F16)
    with pytest.raises(LlmqError, match="weight-only schemes; this one quantizes activations: dynamic int8 per token"):
        QuantLinear(K, N, scheme, device="meta")


def test_stored_tensors_that_contradict_the_scheme_are_refused() -> None:
    module = linear(bias=False)
    module.weight_scale = nn.Parameter(module.weight_scale.data.to(F16), requires_grad=False)
    with pytest.raises(LlmqError, match=r"weight_scale must be torch.bfloat16 \[48, 3\]; got torch.float16"):
        module.quantized_weight()
