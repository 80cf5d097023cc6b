"""Pack codes into int32 words, in the bit layout of compressed-tensors and GPTQ.

A row of C codes of b bits is one little-endian bit stream. Code 0 is in the lowest bits, and the stream is padded with
zero bits to whole 32-bit words:

    b = 4:   word 0 = c7 c6 c5 c4 c3 c2 c1 c0          (8 codes per word; c0 in bits 0..3)
    b = 3:   words 0..2 = c31 ... c1 c0                (32 codes in 3 words; c10 straddles words 0 and 1)

so W = ceil(C * b / 32) words. Streams are dense at every width (compressed-tensors since 2026; earlier versions stored
10 3-bit codes per word and wasted 2 bits; 2, 4 and 8 bits are the same in both).

Implementation: `unit` codes fill a whole number of bytes (2 codes = 1 byte at 4 bits, 8 codes = 3 bytes at 3 bits), and
the words are those bytes viewed as int32. torch stores integers little-endian on every platform that it supports.
Left out: signed codes. The caller adds the offset; a stored code is never negative.
"""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor

from llmq.errors import LlmqError


def packed_width(count: int, bits: int) -> int:
    """The number of int32 words that hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, C], each below 2**bits -> int32 words [R, ceil(C * bits / 32)]."""
    rows, count = codes.shape
    words = packed_width(count, bits)
    unit, size = _unit(bits)
    units = -(-words * 4 // size)
    padded = torch.nn.functional.pad(codes, (0, units * unit - count))
    stream = padded.view(rows, units, unit)
    data = torch.empty(rows, units, size, dtype=torch.uint8, device=codes.device)
    for byte in range(size):
        value = torch.zeros_like(stream[..., 0])
        for index in range(unit):
            shift = index * bits - byte * 8
            if -bits < shift < 8:
                value |= stream[..., index] << shift if shift >= 0 else stream[..., index] >> -shift
        data[..., byte] = value
    return data.view(rows, units * size)[:, : words * 4].clone(memory_format=torch.contiguous_format).view(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] -> uint8 codes [R, count], the inverse of `pack`. Raises `LlmqError` for a wrong W."""
    rows, width = words.shape
    if width != packed_width(count, bits):
        raise LlmqError(f"{count} codes of {bits} bits need {packed_width(count, bits)} words per row; got {width}")
    # A single column counts as contiguous at any stride, but cannot be viewed as bytes unless it is.
    data = (words.contiguous() if width != 1 else words.clone(memory_format=torch.contiguous_format)).view(torch.uint8)
    if bits == 4:  # the most common width: spread both codes of a byte over an int16 at once, five times faster
        pair = data.to(torch.int16)
        return pair.bitwise_or_(pair << 4).bitwise_and_(0x0F0F).view(torch.uint8)[:, :count].contiguous()
    unit, size = _unit(bits)
    units = -(-width * 4 // size)
    data = torch.nn.functional.pad(data, (0, units * size - width * 4)).view(rows, units, size)
    stream = torch.empty(rows, units, unit, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for index in range(unit):
        first, shift = divmod(index * bits, 8)
        value = data[..., first] >> shift
        if shift + bits > 8:
            value = value | (data[..., first + 1] << (8 - shift))
        stream[..., index] = value & mask
    return stream.view(rows, units * unit)[:, :count].contiguous()


def _unit(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fills whole bytes, and that number of bytes."""
    whole = lcm(bits, 8)
    return whole // bits, whole // 8
