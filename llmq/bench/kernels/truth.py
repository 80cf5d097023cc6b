"""What a packed matmul must give, in float64, and whether a result is that: the gate before any figure of speed.

Inputs are drawn anew in every run, every stored bit of a weight included: scales of both signs, codes and zero points
from 0 to the largest. A weight is dequantized by `llmq.kernels.reference` (its own unpack) in pieces of rows, so that
8192 x 28672 needs 2 GB and not 30.

The size of an output element is s = sqrt(y^2 + sum over k of (x w)^2): its own, and what a sum of random signs has. A result
passes where every element is finite and within 8 t s of the truth, and the root mean square of error / s is at most t:
2^-10 in float16, 2^-7 in bfloat16, which is twice and more what one rounding of y and one of each weight cost. A missing
group, a wrong zero point or a part of K left out is off by 2^-4 and more. The error is told, not only that it passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.core.packing import pack
from llmq.errors import LlmqError
from llmq.kernels import reference
from llmq.kernels.problem import Packed

TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
# A rival's arithmetic is its own (sums in float16, float zero points): only what is wrong is refused.
RIVAL_TOLERANCE = 2**-5
WORST = 8
PIECE = 1 << 24
SCALE = 2**-6
WHOLE_ROWS = 32  # zero points of this many rows are whole words at any width


@dataclass(frozen=True)
class Truth:
    """y: x @ W^T + bias, float64 [M, N]. size: sqrt(y^2 + (x * x) @ (W * W)^T), float64 [M, N]."""

    y: Tensor
    size: Tensor


@dataclass(frozen=True)
class Verdict:
    """error: root mean square of (y - truth) / size, NaN where y cannot be compared. wrong: why y is not the truth, or None."""

    error: float
    wrong: str | None


def draw(
    generator: torch.Generator,
    rows: int,
    columns: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    bits: int = 4,
) -> Packed:
    """A random weight [rows, columns] on the generator's device, scales in `dtype`. group_size: columns per scale."""
    if columns % group_size:
        raise LlmqError(f"group_size must divide the {columns} columns; got {group_size}: use {columns} or a divisor")
    device, groups = generator.device, columns // group_size
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8, device=device)
    scale = (torch.randn(rows, groups, generator=generator, device=device) * SCALE).to(dtype)
    zero = None
    if not symmetric:
        points = torch.randint(0, 1 << bits, (groups, rows), generator=generator, dtype=torch.uint8, device=device)
        zero = pack(points, bits).T.contiguous()
    return Packed(rows, columns, bits, group_size, pack(codes, bits), scale, zero)


def draw_input(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """x [rows, columns] on the generator's device, not centred: what is lost of a zero point shows."""
    return (torch.randn(rows, columns, generator=generator, device=generator.device) + 0.3).to(dtype)


def pieces(packed: Packed) -> Iterator[tuple[slice, Packed]]:
    """The weight as weights of fewer rows, and which rows they are."""
    step = max(WHOLE_ROWS, PIECE // packed.columns // WHOLE_ROWS * WHOLE_ROWS)
    for start in range(0, packed.rows, step):
        stop = min(start + step, packed.rows)
        zero = packed.zero
        if zero is not None:
            zero = zero[start * packed.bits // 32 : -(-stop * packed.bits // 32)].contiguous()
        part = replace(packed, rows=stop - start, weight=packed.weight[start:stop], zero=zero)
        yield slice(start, stop), replace(part, scale=packed.scale[start:stop])


def truth(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Truth:
    """What x [M, K] of any dtype gives, on its device."""
    wide, parts, sizes = x.double(), [], []
    for _, part in pieces(packed):
        weight = reference.dequantize(part, torch.float64)
        parts.append(wide @ weight.T)
        sizes.append(wide.square() @ weight.square_().T)
    y, size = torch.cat(parts, 1), torch.cat(sizes, 1)
    if bias is not None:
        y = y + bias.double()
    return Truth(y, size.add_(y.square()).sqrt_())


def judge(y: Tensor, wanted: Truth, tolerance: float | None = None) -> Verdict:
    """Whether y [m, N] is the first m rows of the truth. tolerance: t of this module's docstring; None for that of y's dtype."""
    want, size = wanted.y[: y.shape[0]], wanted.size[: y.shape[0]]
    if y.shape != want.shape or y.dtype not in TOLERANCE:
        return Verdict(float("nan"), f"is {y.dtype} {list(y.shape)}; it must be 16-bit {list(want.shape)}")
    if not y.numel():
        return Verdict(0.0, None)
    lost = ~torch.isfinite(y)
    if bool(lost.any()):
        found = lost.nonzero()
        return Verdict(float("nan"), f"has {len(found)} elements that are not finite, first at {found[0].tolist()}")
    limit = TOLERANCE[y.dtype] if tolerance is None else tolerance
    tiny = torch.finfo(y.dtype).smallest_normal
    error = (y.double() - want).abs_()
    share = error / size.clamp_min(tiny)
    mean = float(share.square().mean().sqrt())
    over = error - size * (WORST * limit) - tiny
    if mean > limit:
        return Verdict(mean, f"is off by {mean:.2g} of its size, at most {limit:.2g} is rounding")
    if bool((over > 0).any()):
        row, column = divmod(int(over.argmax()), y.shape[1])
        values = f"{y[row, column].item():.5g} in the place of {want[row, column].item():.5g}"
        return Verdict(mean, f"has an element that is off, [{row}, {column}]: {values}")
    return Verdict(mean, None)
