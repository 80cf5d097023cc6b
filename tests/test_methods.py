"""RTN, GPTQ and the scale search: equal to slow independent transcriptions, deterministic, better than the naive way."""

from __future__ import annotations

import pytest
import torch

from llmq.blocks.statistics import Statistics
from llmq.config import METHODS, method, resolve
from llmq.core.grid import Grid, fit, quantize
from llmq.errors import LlmqError
from llmq.methods.base import Target, output_errors
from llmq.methods.gptq import gptq, inverse_factor
from llmq.methods.rtn import rtn
from llmq.methods.scales import fit_scales, minmax, search

ROUNDINGS = sorted({row.rounding for row in METHODS})
SHAPES = [(6, 64, 32), (5, 160, 32), (4, 288, None)]  # rows, columns (past one lazy block of 128), group size


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs with uneven energies."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = (
        torch.randn(4 * columns, columns, generator=generator)
        @ mix
        * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    )
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def seen(hessian: torch.Tensor) -> Statistics:
    return Statistics(hessian, 1000)


def target(size: int | None, symmetric: bool = True, scales: str = "search", bits: int = 4) -> Target:
    return Target(Grid(bits, size, symmetric), torch.bfloat16, scales, 0.01)


def slow_gptq(weight: torch.Tensor, hessian: torch.Tensor, to: Target) -> torch.Tensor:
    """Optimal brain quantization with a fixed order, from the definition: invert the Hessian of the columns that are
    left at every step, no Cholesky, no blocks, float64. Returns the dequantized weight.
    """
    scale, zero = fit_scales(to.scales)(weight, to.grid, to.dtype, hessian.diagonal())
    size = to.grid.columns_per_group(weight.shape[1])
    H = hessian.double() + to.damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    W, Q = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    for position, column in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(H[left][:, left])
        s = scale[:, column // size].double()
        z = torch.full_like(s, to.grid.middle) if zero is None else zero[:, column // size].double()
        Q[:, column] = ((W[:, column] / s).round() + z).clamp(0, to.grid.levels).sub(z) * s
        error = (W[:, column] - Q[:, column]) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0][None]
    return Q


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_equals_a_slow_transcription(rows: int, columns: int, size: int | None, symmetric: bool) -> None:
    weight, hessian = problem(rows, columns)
    to = target(size, symmetric)
    fast = gptq(weight, seen(hessian), to).weight.dequantize(torch.float64)
    slow = slow_gptq(weight, hessian, to)
    step = fit_scales("search")(weight, to.grid, to.dtype, hessian.diagonal())[0].float().abs().max()
    different = (fast - slow).abs() > 0.1 * step
    assert different.float().mean() < 0.01, "float32 may break a tie otherwise here and there, no more"
    first_half = torch.argsort(hessian.diagonal(), descending=True, stable=True)[: columns // 2]
    assert torch.allclose(fast[:, first_half], slow[:, first_half], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rtn_and_search_beats_minmax_at_every_width(bits: int, symmetric: bool) -> None:
    weight, hessian = problem(32, 128)

    def error(name: str, scales: str) -> float:
        rounded = resolve(method(name).rounding)(weight, seen(hessian), target(32, symmetric, scales, bits))
        return output_errors(weight, [rounded.weight], hessian)[0]

    assert error("gptq", "minmax") < 0.7 * error("rtn", "minmax")
    assert error("gptq", "search") < 0.9 * error("rtn", "search")  # whose scales cancel errors too: llmq.methods.joint
    if bits < 8:
        assert error("gptq", "search") < error("gptq", "minmax")


@pytest.mark.parametrize("path", ROUNDINGS)
def test_roundings_are_deterministic_and_leave_their_inputs_alone(path: str) -> None:
    weight, hessian = problem(8, 64)
    copies = weight.clone(), hessian.clone()
    rounding = resolve(path)
    first = rounding(weight, seen(hessian), target(32)).weight
    second = rounding(weight, seen(hessian), target(32)).weight
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


@pytest.mark.parametrize("path", ROUNDINGS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_do_not_depend_on_each_other(path: str, symmetric: bool) -> None:
    weight, hessian = problem(12, 64)
    rounding = resolve(path)
    together = rounding(weight, seen(hessian), target(32, symmetric)).weight
    apart = rounding(weight[4:9], seen(hessian), target(32, symmetric)).weight
    assert torch.equal(together.rows(4, 9).codes, apart.codes)


def test_rtn_is_the_nearest_code_on_minmax_scales() -> None:
    weight, _ = problem(8, 64)
    to = target(32, scales="minmax")
    expected = quantize(weight, *fit(weight, to.grid, to.dtype), to.grid)
    assert torch.equal(rtn(weight, None, to).weight.codes, expected.codes)


def test_gptq_without_data_is_refused() -> None:
    with pytest.raises(LlmqError, match="needs calibration data"):
        gptq(torch.ones(2, 32), None, target(32))


def slow_search(weight: torch.Tensor, size: int, importance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The least weighted error that any symmetric candidate reaches, group by group, in float64."""
    from llmq.methods.scales import SYMMETRIC_RATIOS

    best = []
    for row in weight.double():
        for start in range(0, len(row), size):
            group, weights = row[start : start + size], importance.double()[start : start + size]
            errors = []
            for ratio in SYMMETRIC_RATIOS:
                for sign in (1, -1):
                    scale = (group.abs().max().float() / 8 * ratio).to(dtype).double() * sign
                    error = (group / scale).round().clamp(-8, 7) * scale - group
                    errors.append((error**2 * weights).sum())
            best.append(torch.stack(errors).min())
    return torch.stack(best).view(len(weight), -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_search_finds_the_best_candidate(dtype: torch.dtype) -> None:
    weight, hessian = problem(6, 96)
    importance, grid = hessian.diagonal(), Grid(4, 32, True)
    scale, zero = search(weight, grid, dtype, importance)
    assert scale.dtype == dtype
    error = (quantize(weight, scale, zero, grid).dequantize(torch.float64) - weight) ** 2 * importance
    reached = error.view(6, 3, 32).sum(-1)
    assert torch.allclose(reached, slow_search(weight, 32, importance, dtype), rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_is_never_worse_than_minmax_without_data(symmetric: bool) -> None:
    weight, _ = problem(16, 128)
    grid = Grid(4, 32, symmetric)
    errors = []
    for choose in ("minmax", "search"):
        scale, zero = fit_scales(choose)(weight, grid, torch.bfloat16, None)
        errors.append((quantize(weight, scale, zero, grid).dequantize(torch.float32) - weight).square().sum())
    assert errors[1] < 0.97 * errors[0]


def test_search_uses_negative_scales() -> None:
    weight, _ = problem(16, 128)
    scale, _ = search(weight, Grid(4, 32, True), torch.bfloat16)
    assert bool((scale < 0).any())
    assert bool((scale > 0).any())


def test_search_survives_zero_groups_and_dead_columns() -> None:
    weight = torch.zeros(2, 64)
    weight[1, :32] = torch.randn(32)
    for symmetric in (True, False):
        scale, zero = search(weight, Grid(4, 32, symmetric), torch.bfloat16, torch.zeros(64))
        quantized = quantize(weight, scale, zero, Grid(4, 32, symmetric))
        assert bool((scale != 0).all())
        assert bool((quantized.dequantize()[weight == 0] == 0).all())


def test_factor_inverts_the_damped_hessian() -> None:
    _, hessian = problem(2, 48)
    factor, notes = inverse_factor(hessian, torch.arange(len(hessian)), 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    assert notes == ()
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(48), atol=1e-3)


def test_dead_inputs_are_named_and_rounded_to_nearest() -> None:
    weight, hessian = problem(4, 64)
    dead = [3, 40]
    hessian[dead] = 0
    hessian[:, dead] = 0
    rounded = gptq(weight, seen(hessian), target(32))
    assert rounded.notes == ("2 dead inputs",)
    nearest = quantize(weight, rounded.weight.scale, None, Grid(4, 32, True))
    assert torch.equal(rounded.weight.codes[:, dead], nearest.codes[:, dead])


def test_more_damping_then_float64_each_said() -> None:
    weight, _ = problem(4, 32)
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    rounded = gptq(weight, seen(indefinite), target(32))
    assert rounded.notes == ("not positive definite at damping 0.01 in float32",)
    indefinite[0, 1] = indefinite[1, 0] = 3.0
    with pytest.raises(LlmqError, match="cannot be factored even with damping 1 in float64"):
        gptq(weight, seen(indefinite), target(32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_data_the_search_clips_next_to_nothing_and_is_no_worse_than_min_max(symmetric: bool) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    grid = Grid(4, 64, symmetric)
    found, plain = (quantize(weight, *how(weight, grid, torch.bfloat16, None), grid) for how in (search, minmax))
    groups = (weight - found.dequantize(torch.float32)).view(16, 4, 64)
    assert bool((groups.abs().amax(-1) <= found.scale.float().abs()).all()), "less than a step, even of the largest"
    errors = [float((weight - q.dequantize(torch.float32)).square().sum()) for q in (found, plain)]
    assert errors[0] <= errors[1]
