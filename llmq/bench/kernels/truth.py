"""The exact result of a packed matmul in float64, and the test whether a result equals it up to rounding.

Inputs are drawn anew in every run, every stored bit of a weight included: scales of both signs, codes and zero points from
0 to the largest. A weight is dequantized by `llmq.kernels.reference` (which has its own unpacking) in pieces of rows, so that
8192 x 28672 needs 2 GB and not 30.

The size of an output element is s = sqrt(y^2 + sum over k of (x w)^2): its own size, and that of a sum with random signs. A
result is right if every element is finite and within 8 t s of the truth, and the root mean square of error / s is at most t:
2^-10 in float16, 2^-7 in bfloat16, at least twice the cost of one rounding of y and one of each weight. A missing group, a
wrong zero point or a missing part of K gives an error of 2^-4 and more.
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
# Rivals compute differently (float16 sums, float zero points): refuse only wrong results.
RIVAL_TOLERANCE = 2**-5
MAX_TO_MEAN = 8  # an element may be off by this multiple of the tolerance of the mean
PIECE = 1 << 24  # weights
SCALE = 2**-6  # standard deviation of drawn scales
WHOLE_ROWS = 32  # the zero points of this many rows fill whole words at any width


@dataclass(frozen=True)
class Truth:
    """The exact result of a packed matmul."""

    y: Tensor
    """x @ W^T + bias, float64 [M, N]."""
    size: Tensor
    """sqrt(y^2 + (x * x) @ (W * W)^T), float64 [M, N]: the size that errors are relative to."""


@dataclass(frozen=True)
class Verdict:
    """The comparison of a result with the truth."""

    error: float
    """Root mean square of (y - truth) / size; NaN if y cannot be compared."""
    wrong: str | None
    """The reason why y is wrong; None if it is right."""


def draw(
    generator: torch.Generator,
    n: int,
    k: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    bits: int = 4,
) -> Packed:
    """A random weight [n, k] on the generator's device, scales in `dtype`. group_size: columns per scale."""
    if k % group_size:
        raise LlmqError(f"group_size must divide in_features {k}; got {group_size}; use {k} or a divisor")
    device, groups = generator.device, k // group_size
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8, device=device)
    scale = (torch.randn(n, groups, generator=generator, dtype=torch.float32, device=device) * SCALE).to(dtype)
    zero = None
    if not symmetric:
        points = torch.randint(0, 1 << bits, (groups, n), generator=generator, dtype=torch.uint8, device=device)
        zero = pack(points, bits).T.contiguous()
    return Packed(n, k, bits, group_size, pack(codes, bits), scale, zero)


def draw_input(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """x [rows, columns] on the generator's device, with mean 0.3, so that a wrong zero point shows."""
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device=generator.device)
    return (noise + 0.3).to(dtype)


def pieces(packed: Packed) -> Iterator[tuple[slice, Packed]]:
    """The weight as several weights of fewer rows, each with its rows."""
    step = max(WHOLE_ROWS, PIECE // packed.in_features // WHOLE_ROWS * WHOLE_ROWS)
    for start in range(0, packed.out_features, step):
        stop = min(start + step, packed.out_features)
        zero = packed.zero
        if zero is not None:
            zero = zero[start * packed.bits // 32 : -(-stop * packed.bits // 32)].contiguous()
        part = replace(packed, out_features=stop - start, weight=packed.weight[start:stop], zero=zero)
        yield slice(start, stop), replace(part, scale=packed.scale[start:stop])


def truth(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Truth:
    """The exact result for x [M, K] of any dtype, on its device."""
    wide, parts, sizes = x.double(), [], []
    for _, part in pieces(packed):
        weight = reference.dequantize(part, torch.float64)
        parts.append(wide @ weight.T)
        sizes.append(wide.square() @ weight.square_().T)
    y, size = torch.cat(parts, 1), torch.cat(sizes, 1)
    if bias is not None:
        y = y + bias.double()
    return Truth(y, size.add_(y.square()).sqrt_())


def judge(y: Tensor, expected: Truth, tolerance: float | None = None) -> Verdict:
    """Compare y [m, N] with the first m rows of the truth. tolerance: t in the module docstring; None for that of y's dtype."""
    want, size = expected.y[: y.shape[0]], expected.size[: y.shape[0]]
    if y.shape != want.shape or y.dtype not in TOLERANCE:
        return Verdict(float("nan"), f"is {y.dtype} {list(y.shape)}; it must be 16-bit {list(want.shape)}")
    if not y.numel():
        return Verdict(0.0, None)
    bad = (~torch.isfinite(y)).nonzero()
    if len(bad):
        return Verdict(float("nan"), f"has {len(bad)} elements that are not finite, first at {bad[0].tolist()}")
    limit = TOLERANCE[y.dtype] if tolerance is None else tolerance
    tiny = torch.finfo(y.dtype).smallest_normal
    error = (y.double() - want).abs_()
    share = error / size.clamp_min(tiny)
    mean = float(share.square().mean().sqrt())
    over = error - size * (MAX_TO_MEAN * limit) - tiny
    if mean > limit:
        return Verdict(mean, f"has a relative error of {mean:.2g}; rounding explains at most {limit:.2g}")
    if bool((over > 0).any()):
        row, column = divmod(int(over.argmax()), y.shape[1])
        values = f"{y[row, column].item():.5g} instead of {want[row, column].item():.5g}"
        return Verdict(mean, f"has a wrong element [{row}, {column}]: {values}")
    return Verdict(mean, None)
