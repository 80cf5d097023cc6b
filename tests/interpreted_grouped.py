"""The kernel for packed experts in Triton's interpreter, compared with float64. Run by `test_wna16.py` in its own process.

See `interpreted_wna16.py` for what the interpreter leaves out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.kernels import grouped, reference, wna16
from llmq.kernels.grouped import GroupedWeight
from llmq.kernels.launch import Launch
from llmq.kernels.problem import Packed
from tests.fixtures import drawn
from tests.interpreted_wna16 import BF16, F16, FORMS, assert_right, inputs, launch

CASES = [  # experts, M, top, N, K, group
    (1, 9, 1, 33, 160, 32),
    (4, 3, 2, 70, 192, 64),
    (8, 3, 2, 65, 256, 128),
    (2, 2, 2, 33, 512, 256),
    (5, 3, 2, 19, 37, 37),
]
GRIDS = [(4, F16, True), (4, F16, False), (4, BF16, False), (8, F16, False), (8, BF16, True)]  # bits, dtype, symmetric
PAIRS = [(case, GRIDS[(index + shift) % 5]) for index, case in enumerate(CASES) for shift in (0, 2)]


def weights(
    count: int, n: int, k: int, size: int, symmetric: bool, dtype: torch.dtype, bits: int = 4
) -> tuple[list[Packed], GroupedWeight]:
    parts = [drawn(n, k, size, symmetric, dtype, seed, bits) for seed in range(count)]
    return parts, grouped.prepare(parts)


def routed(count: int, tokens: int, top: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.stack([torch.randperm(count, generator=generator)[:top] for _ in range(tokens)]).flatten()
    return experts, torch.arange(tokens).repeat_interleave(top)


@pytest.mark.parametrize(("case", "grid"), PAIRS, ids=str)
def test_any_shape_equals_the_reference(case: tuple[int, ...], grid: tuple[int, torch.dtype, bool]) -> None:
    bits, dtype, symmetric = grid
    count, tokens, top, n, k, size = case
    parts, weight = weights(count, n, k, size, symmetric, dtype, bits)
    experts, rows = routed(count, tokens, top)
    x, bias = inputs(tokens, k, dtype), inputs(count, n, dtype)
    y = grouped.launched(x, experts, rows, weight, bias, launch(8, dtype), pairs=False)
    for expert, packed in enumerate(parts):
        mine = experts == expert
        assert_right(y[mine], x[rows[mine]], packed, bias[expert])
    assert torch.equal(y, grouped.launched(x, experts, rows, weight, bias, launch(8, dtype), pairs=True)), "same bits"
    assert torch.equal(y, grouped.launched(x[rows], experts.int(), None, weight, bias, launch(8, dtype), pairs=False))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_experts_equal_the_few_rows_kernel_to_the_bit(dtype: torch.dtype) -> None:
    parts, weight = weights(3, 128, 256, 128, False, dtype)
    x, experts = inputs(9, 256, dtype), torch.tensor([2, 0, 2, 2, 2, 2, 2, 2, 2])
    wide = Launch(8, 128, 4, 3, 1, FORMS[dtype])
    for configuration in (launch(8, dtype), wide, launch(16, dtype)):
        y = grouped.launched(x, experts, None, weight, None, configuration, pairs=False)
        for expert in (0, 2):
            mine = experts == expert
            assert torch.equal(y[mine], wna16.multiply(x[mine], wna16.prepare(parts[expert]), None, launch(8, dtype)))


def test_blocks_of_64_fold_small_groups() -> None:
    parts, weight = weights(2, 64, 128, 64, True, F16)
    x, experts = inputs(70, 128, F16), (torch.arange(70) % 35 == 0).long()  # 68 to expert 0: two blocks
    y = grouped.launched(x, experts, None, weight, None, Launch(64, 64, 4, 3, 1, "portable"), pairs=False)
    for expert, packed in enumerate(parts):
        mine, dense = experts == expert, reference.dequantize(packed, torch.float64)
        assert torch.allclose(y[mine].double(), x[mine].double() @ dense.T, rtol=4e-3, atol=4e-3 * float(y.abs().max()))


@pytest.mark.parametrize("pairs", [None, True, False])
def test_experts_that_do_not_exist_give_zeros(pairs: bool | None) -> None:
    parts, weight = weights(2, 64, 128, 128, True, F16)
    x, experts = inputs(4, 128, F16), torch.tensor([2, 1, -1, 1])
    y = grouped.launched(x, experts, None, weight, None, launch(8, F16), pairs)
    assert not y[[0, 2]].any()
    assert_right(y[[1, 3]], x[[1, 3]], parts[1])


def test_no_assignments_one_assignment_and_many_experts() -> None:
    parts, weight = weights(512, 5, 32, 32, True, F16)
    x = inputs(10, 32, F16)
    assert grouped.multiply(
        x, torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64), weight
    ).shape == (0, 5)
    assert grouped.multiply(x[:0], torch.tensor([], dtype=torch.int32), None, weight).shape == (0, 5)
    assert_right(grouped.multiply(x, torch.tensor([511]), torch.tensor([7]), weight), x[7:8], parts[511])
    experts = torch.full((10,), 300)
    assert_right(grouped.multiply(x, experts, None, weight), x, parts[300])


def test_the_operator_compiles_and_runs_on_fake_tensors() -> None:
    _, weight = weights(4, 66, 128, 128, False, F16)
    x, experts = inputs(6, 128, F16), torch.tensor([3, 1, 1, 0, 2, 3])
    want = grouped.multiply(x, experts, None, weight)
    compiled = torch.compile(grouped.multiply, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, experts, None, weight), want)
    sizes = (weight.out_features, weight.in_features, weight.bits, weight.group_size)
    arguments = (x, experts, None, weight.words, weight.scales, weight.zeros, None, *sizes)
    torch.library.opcheck(
        torch.ops.llmq.wna16_grouped.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_wrong_arguments_are_refused() -> None:
    parts, weight = weights(2, 64, 128, 128, True, F16)
    x, experts = inputs(3, 128, F16), torch.tensor([0, 1, 0])
    with pytest.raises(LlmqError, match="at least 1 expert; got 0"):
        grouped.prepare([])
    with pytest.raises(LlmqError, match="same shape, bits"):
        grouped.prepare([parts[0], drawn(65, 128, 128, True, F16)])
    with pytest.raises(LlmqError, match="a row for each of 3 assignments; got 2"):
        grouped.multiply(x[:2], experts, None, weight)
    with pytest.raises(LlmqError, match=r"rows must be int32 or int64 \[T\], like experts"):
        grouped.multiply(x, experts, experts[:2], weight)
    with pytest.raises(LlmqError, match="bias must be"):
        grouped.multiply(x, experts, None, weight, inputs(1, 64, F16)[0])
