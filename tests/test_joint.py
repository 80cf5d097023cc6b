"""The scale search with the whole Hessian: equal to a slow transcription, never worse than its start, better on real inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.blocks.statistics import Statistics
from llmq.core.grid import Grid, checked_scale, quantize
from llmq.methods.base import Target
from llmq.methods.joint import FACTORS, STEP, WIDEST, search_jointly
from llmq.methods.rtn import rtn
from llmq.methods.scales import search

DAMPING = 0.01


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of inputs that go together, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ (mix + 0.3) * torch.rand(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def loss(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid, h: torch.Tensor
) -> torch.Tensor:
    """Of each row, with the damped Hessian, in float64."""
    error = (quantize(weight, scale, zero, grid).dequantize(torch.float32) - weight).double()
    damped = h.double() + DAMPING * h.diagonal().double().mean() * torch.eye(len(h))
    return ((error @ damped) * error).sum(-1)


def slow(weight: torch.Tensor, grid: Grid, dtype: torch.dtype, h: torch.Tensor) -> torch.Tensor:
    """One sweep, written out: every candidate of every group of every row, the whole row's loss each time. -> [N]."""
    scale, zero = search(weight, grid, dtype, h.diagonal(), STEP)
    for row in range(len(weight)):
        one = slice(row, row + 1)
        for group in range(scale.shape[1]):
            tried = [(scale[row, group].clone(), None if zero is None else zero[row, group].clone())]
            for factor in FACTORS:
                wide = checked_scale(tried[0][0].abs().float() * factor, dtype)
                if zero is None:
                    tried += [(wide, None), (-wide, None)]
                else:
                    middle = int((float(tried[0][1]) / torch.tensor(factor)).round())
                    places = [min(max(middle + shift, 0), grid.levels) for shift in (0, -1, 1)]
                    tried += [(wide, torch.tensor(place, dtype=torch.uint8)) for place in places]
            losses = []
            for candidate, offset in tried:
                scale[row, group] = candidate
                if zero is not None:
                    zero[row, group] = offset
                losses.append(float(loss(weight[one], scale[one], None if zero is None else zero[one], grid, h)))
            best = min(range(len(tried)), key=losses.__getitem__)
            scale[row, group] = tried[best][0]
            if zero is not None:
                zero[row, group] = tried[best][1]
    return loss(weight, scale, zero, grid, h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [Grid(4, 16, True), Grid(4, 16, False), Grid(3, 32, True), Grid(2, None, False)])
def test_equals_the_sweep_written_out(grid: Grid, dtype: torch.dtype) -> None:
    weight, h = problem(5, 64)
    reached = loss(weight, *search_jointly(weight, grid, dtype, h, DAMPING), grid, h)
    assert torch.allclose(reached, slow(weight, grid, dtype, h), rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([16, 32, 96]))
def test_no_row_is_worse_than_with_the_diagonal(seed: int, bits: int, symmetric: bool, size: int) -> None:
    weight, h = problem(4, 96, seed)
    grid = Grid(bits, size, symmetric)
    started = loss(weight, *search(weight, grid, torch.bfloat16, h.diagonal(), STEP), grid, h)
    reached = loss(weight, *search_jointly(weight, grid, torch.bfloat16, h, DAMPING), grid, h)
    assert bool((reached <= started * (1 + 1e-4)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_of_inputs_that_go_together_cancel(symmetric: bool) -> None:
    weight, h = problem(64, 256)
    grid = Grid(4, 64, symmetric)
    with_diagonal = loss(weight, *search(weight, grid, torch.bfloat16, h.diagonal()), grid, h).sum()
    assert loss(weight, *search_jointly(weight, grid, torch.bfloat16, h, DAMPING), grid, h).sum() < 0.8 * with_diagonal


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    weight, h = problem(1300, 64)
    grid = Grid(4, 32, True)
    scale, _ = search_jointly(weight, grid, torch.bfloat16, h, DAMPING)
    apart, _ = search_jointly(weight[1020:1030], grid, torch.bfloat16, h, DAMPING)
    assert (scale[1020:1030] == apart).float().mean() > 0.9  # a product of other sizes may round otherwise


def test_groups_wider_than_its_products_pay_for_keep_the_diagonal() -> None:
    weight, h = problem(3, 2 * WIDEST)
    grid = Grid(4, None, True)
    assert torch.equal(
        search_jointly(weight, grid, torch.bfloat16, h, DAMPING)[0],
        search(weight, grid, torch.bfloat16, h.diagonal())[0],
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_groups_and_dead_inputs_survive(symmetric: bool) -> None:
    weight = torch.zeros(2, 64)
    weight[1, :32] = torch.randn(32)
    for h in (torch.zeros(64, 64), torch.eye(64)):
        scale, zero = search_jointly(weight, Grid(4, 32, symmetric), torch.bfloat16, h, DAMPING)
        assert bool(torch.isfinite(scale).all()) and bool((scale != 0).all())  # noqa: PT018
        rounded = quantize(weight, scale, zero, Grid(4, 32, symmetric)).dequantize()
        assert bool((rounded[weight == 0] == 0).all())


def test_nearest_rounding_takes_it_where_there_is_data() -> None:
    weight, h = problem(8, 128)
    grid = Grid(4, 32, True)
    expected, _ = search_jointly(weight, grid, torch.bfloat16, h, DAMPING)
    rounded = rtn(weight, Statistics(h, 1000), Target(grid, torch.bfloat16, "search", DAMPING)).weight
    assert torch.equal(rounded.scale, expected)
    assert torch.equal(rounded.codes, quantize(weight, expected, None, grid).codes)
