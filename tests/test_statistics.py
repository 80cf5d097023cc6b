"""Second moments: equal to their definition, summed in fixed lanes, held out by whole windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.blocks.statistics import LANES, PANEL, LaneSum, SecondMoment, held_out_start, observe, split_into_lanes
from llmq.errors import LlmqError

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [5, PANEL, PANEL + 1, 2 * PANEL + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_second_moment_is_the_mean_of_outer_products(features: int, dtype: torch.dtype) -> None:
    x = drawn(3, 20, features).to(dtype)
    moment = SecondMoment(features, CPU)
    for lane, part in enumerate(x):
        moment.add(part, lane)
    flat = x.reshape(-1, features).double()
    found = moment.value("it")
    torch.testing.assert_close(found.double(), flat.T @ flat / 60, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)
    assert moment.tokens == 60


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 40))
def test_batches_hold_the_windows_of_one_lane_in_order(count: int, length: int, tokens: int) -> None:
    windows = torch.arange(count * length).view(count, length)
    batches, lanes = split_into_lanes(windows, tokens)
    assert list(lanes) == sorted(lanes)
    assert all(len(batch) <= max(1, tokens // length) for batch in batches)
    for lane in range(min(LANES, count)):
        mine = torch.cat([batch for batch, place in zip(batches, lanes, strict=True) if place == lane])
        assert torch.equal(mine, windows[lane::LANES])


def ranks_moment(x: torch.Tensor, ranks: int, tokens: int) -> torch.Tensor:
    """What `ranks` processes get that share the lanes and add their sums in the lanes' order. x: [windows, tokens, K]."""
    order = torch.arange(len(x))[:, None]
    parts: dict[int, torch.Tensor] = {}
    for rank in range(ranks):
        batches, lanes = split_into_lanes(order, tokens)
        for lane in range(rank, LANES, ranks):
            mine = LaneSum((x.shape[2], x.shape[2]), CPU)
            for batch, place in zip(batches, lanes, strict=True):
                if place == lane:
                    flat = x[batch[:, 0]].reshape(-1, x.shape[2])
                    mine.of(lane).addmm_(flat.T, flat)
            parts[lane] = mine.value()
    total = parts[0]
    for lane in range(1, LANES):
        total = total + parts[lane]
    return total / x[..., 0].numel()


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_one_two_four_and_eight_processes_get_the_same_bits(count: int) -> None:
    x = drawn(count, 16, 24) * torch.logspace(-2, 2, 24)
    batches, lanes = split_into_lanes(torch.arange(count)[:, None], 2)
    moment = SecondMoment(24, CPU)
    for batch, lane in zip(batches, lanes, strict=True):
        moment.add(x[batch[:, 0]], lane)
    alone = moment.value("it")
    for ranks in (1, 2, 4, 8):
        assert torch.equal(ranks_moment(x, ranks, 2).triu(), alone.triu())


def test_lanes_must_come_in_order() -> None:
    lanes = LaneSum((2,), CPU)
    lanes.of(3)
    with pytest.raises(AssertionError, match="ascending"):
        lanes.of(1)


@pytest.mark.parametrize(
    ("windows", "length", "batch", "start"),
    [
        (8, 12, 3, 72),
        (5, 12, 2, 48),
        (3, 16, 3, 32),
        (2, 16, 1, 16),
        (4, 2048, 2, 6144),
        (4, 4096, 1, 12288),
        (1, 40, 1, 30),
    ],
)
def test_whole_windows_are_held_out(windows: int, length: int, batch: int, start: int) -> None:
    """At 2048 tokens two windows make a batch, at 4096 one: neither may be cut, nor be both fitted and held out."""
    hidden = [torch.zeros(len(part), length, 1) for part in torch.arange(windows).split(batch)]
    assert held_out_start(hidden) == start


def test_held_out_tokens_are_the_last_ones_and_no_others() -> None:
    x = drawn(6, 10, 7)
    given = [(0, x[:2]), (1, x[2:4]), (2, x[4:])]
    apart = observe(given, "it", 45, apart=True)
    flat = x.reshape(-1, 7)
    fitted, other = flat[:45], flat[45:]
    torch.testing.assert_close(apart.hessian, fitted.T @ fitted / 45)
    assert apart.held_out is not None
    torch.testing.assert_close(apart.held_out, other.T @ other / 15)
    assert apart.mean_abs is not None
    torch.testing.assert_close(apart.mean_abs, fitted.abs().mean(0))
    assert (apart.tokens, apart.held_out_tokens) == (45, 15)
    beside = observe(given, "it", 45)
    torch.testing.assert_close(beside.hessian, flat.T @ flat / 60)
    assert beside.held_out is not None
    assert torch.equal(beside.held_out, apart.held_out)
    assert (beside.tokens, beside.held_out_tokens, beside.mean_abs) == (60, 15, None)
    alone = observe(given, "it")
    assert torch.equal(alone.hessian, beside.hessian)
    assert alone.held_out is None


def test_inputs_that_are_not_finite_and_that_never_come_are_refused_by_name() -> None:
    with pytest.raises(LlmqError, match="no token reached layer"):
        observe([], "layer")
    with pytest.raises(LlmqError, match="no token reached layer"):
        observe([(0, torch.empty(0, 4))], "layer")
    with pytest.raises(LlmqError, match="the input of layer holds NaN or inf"):
        observe([(0, torch.full((2, 4), float("inf")))], "layer")


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float32_whatever_torchs_default_is(default: torch.dtype) -> None:
    x = drawn(4, 10, 6)
    want = observe([(0, x)], "it", 30, apart=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = observe([(0, x)], "it", 30, apart=True)
    finally:
        torch.set_default_dtype(before)
    assert found.mean_abs is not None
    assert found.hessian.dtype == found.mean_abs.dtype == torch.float32
    assert torch.equal(found.hessian, want.hessian)
