"""The unpacking in PTX, executed instruction by instruction in Python: neither a CPU nor Triton's interpreter runs it."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmq.kernels import _unpack

FORMS = {
    (4, torch.float16, True): _unpack._F16,
    (4, torch.float16, False): _unpack._F16_ZERO,
    (4, torch.bfloat16, True): _unpack._BF16,
    (4, torch.bfloat16, False): _unpack._BF16_ZERO,
    (8, torch.float16, True): _unpack._F16_BYTES,
    (8, torch.float16, False): _unpack._F16_BYTES_ZERO,
    (8, torch.bfloat16, True): _unpack._BF16_BYTES,
    (8, torch.bfloat16, False): _unpack._BF16_BYTES_ZERO,
}
FULL = 0xFFFFFFFF


def logic(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """lop3: bit 4a + 2b + c of the table, for each bit position."""
    result = torch.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            terms = [value if index >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result & FULL


def halves(word: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = ((word >> shift & 0xFFFF).to(torch.uint16).view(dtype).double() for shift in (0, 16))
    return low, high


def joined(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Both values rounded once to dtype, in the halves of a word."""
    bits = [value.to(dtype).view(torch.uint16).long() for value in (low, high)]
    return bits[0] | bits[1] << 16


def executed(code: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The registers after the code. inputs: int64 in 0 .. 2**32 - 1, keyed by operand."""
    registers = dict(inputs)
    like = next(iter(inputs.values()))

    def value(operand: str) -> Tensor:
        return torch.full_like(like, int(operand, 16)) if operand.startswith("0x") else registers[operand]

    for statement in code.strip().strip("{}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *operands = re.findall(r"\{[^}]*\}|[$\w]+", rest)
        kind = torch.bfloat16 if name.endswith("bf16x2") else torch.float16
        if name == "mov.b32" and target.startswith("{"):
            low, high = re.findall(r"\$\d+", target)
            registers[low], registers[high] = value(operands[0]) & 0xFFFF, value(operands[0]) >> 16
        elif name == "mov.b32":
            registers[target] = value(operands[0])
        elif name in ("shr.u32", "shl.b32"):
            shift = int(operands[1])
            registers[target] = (
                value(operands[0]) >> shift if name == "shr.u32" else value(operands[0]) << shift
            ) & FULL
        elif name == "or.b32":
            registers[target] = value(operands[0]) | value(operands[1])
        elif name == "lop3.b32":
            registers[target] = logic(*map(value, operands[:3]), int(operands[3], 16))
        elif name == "sub.f16x2":
            (a, b), (c, d) = (halves(value(operand), kind) for operand in operands)
            registers[target] = joined(a - c, b - d, kind)
        elif name in ("fma.rn.f16x2", "fma.rn.bf16x2"):
            (a, b), (c, d), (e, f) = (halves(value(operand), kind) for operand in operands)
            registers[target] = joined(a * c + e, b * d + f, kind)
        else:
            raise AssertionError(f"unknown instruction {name}")
    return registers


@pytest.mark.parametrize(("bits", "dtype", "symmetric"), FORMS, ids=str)
def test_every_code_minus_every_zero_point(bits: int, dtype: torch.dtype, symmetric: bool) -> None:
    """Every code beside every other, in every place of a word; every zero point."""
    count, places = 1 << bits, 16 // bits
    low, high = (codes.flatten() for codes in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"))
    turned = [(low.roll(17 * place), high.roll(29 * place)) for place in range(places)]
    word = sum(a << bits * place | b << 16 + bits * place for place, (a, b) in enumerate(turned))
    points = [(count // 2,) * places]
    if not symmetric:
        points += [(zero,) * places for zero in range(count)]
        points += list(itertools.permutations((0, count - 1, 3, count // 2), places))
    first = 2 * places
    for zeros in points:
        inputs = {f"${first}": torch.as_tensor(word)}
        inputs |= {f"${first + 1 + p}": torch.full_like(low, zero * 0x10001) for p, zero in enumerate(zeros)}
        registers = executed(FORMS[bits, dtype, symmetric].value, inputs)
        for place, (a, b) in enumerate(turned):
            for offset, codes in enumerate((a, b)):
                got = registers[f"${2 * place + offset}"].to(torch.uint16).view(dtype)
                assert torch.equal(got.double(), (codes - zeros[place]).double()), (zeros, place)


def test_a_wrong_instruction_is_detected() -> None:
    code = _unpack._F16_BYTES.value.replace("0x64806480", "0x64816480")
    assert code != _unpack._F16_BYTES.value
    word = torch.tensor([0x12345678])
    low, high = (executed(text, {"$4": word})["$1"] for text in (_unpack._F16_BYTES.value, code))
    assert not torch.equal(low, high)
