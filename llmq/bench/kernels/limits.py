"""The launches that are compiled ahead of time, and the limits that their machine code must keep.

The cases are those that the rules of `llmq.kernels.launch` choose: every bucket and width at groups of 128, both dtypes,
symmetric and not. Other groups, and 8 bits, are compiled at the smallest and the largest common block, where the fewest and
the most registers are used. K is split into four, which takes more code than more parts or none; common blocks are compiled
without a split too. All have a bias. The launches of the measured tables in `tuned/` are added, with zero points and without,
and the dequantize kernel at every width.

There are two kinds of limits. Rules are the same for every version of Triton: no local memory, shared memory within the
architecture's, its best tensor-core instruction, no integer converted to a float, no narrow load of weights or x, no store to
shared memory in the loop, and the design's instructions per weight (`DESIGN`). Recorded limits only fall: `limits.json` has
the best result of each version of Triton for each case plus `SLACK`; `check_kernels.py --write` lowers what has become
better and adds new cases, and raises nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from llmq.bench.kernels.machine_code import DequantCase, MachineCode, MatmulCase
from llmq.kernels.launch import (
    TUNED,
    Launch,
    buckets,
    form_of,
    launch_of,
    rows_of,
    stages_of,
    tables_of,
    warps_of,
)

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# KB of shared memory that one block may have.
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx1100": 64}
PRODUCT = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma", "gfx1100": "wmma"}
# sm_90, float16, symmetric, groups of 128: a GPU at its memory bandwidth has time for 4 instructions per weight.
DESIGN = {"assembly": 3.0, "portable": 4.0}
# (bm, bn) that exceed it: the rules choose them only if N / 64 is odd (bn 64), or if two blocks would cost more (bm 128:
# 3.84 to 3.88 for 128 rows against twice 2.71 for 64).
EXCEPTIONS = {(32, 64): 3.1, (64, 64): 3.5, (128, 64): 4.15, (128, 128): 3.9}
# Dequantizing writes 2 bytes per weight: an H200 at its memory bandwidth has time for 19 instructions.
DEQUANT = 19.0
SHORT = {"float16": "fp16", "bfloat16": "bf16"}
LONG = {short: long for long, short in SHORT.items()}
SLACK = 0.03
LIMITS = Path(__file__).resolve().parent / "limits.json"


def cases(arch: str) -> Iterator[MatmulCase | DequantCase]:
    """All launches of an architecture."""
    for bits in (2, 3, 4, 8):
        yield DequantCase(arch, "fp16", bits, 128, True)
        yield DequantCase(arch, "bf16", bits, 32, False)
        yield DequantCase(arch, "fp16", bits, 0, False)
    sizes = buckets(arch)
    for dtype in ("fp16", "bf16"):
        for symmetric in (True, False):
            for bm in sizes:
                for bn in (64, 128):
                    yield case_of(arch, dtype, 128, symmetric, bm, bn)
            for bm, bn in [(16, 64), (64, 128)] + [(bm, 128) for bm in sizes if bm > 64]:
                for group in (0, 64, 32):
                    yield case_of(arch, dtype, group, symmetric, bm, bn)
                for group in (128, 32):
                    yield case_of(arch, dtype, group, symmetric, bm, bn, bits=8)
    yield from (case_of(arch, "fp16", 128, True, bm, bn, split=1) for bm, bn in ((16, 64), (64, 128)))
    if arch == "sm_90":
        yield from (case_of(arch, "fp16", 128, True, 16, bn, "portable") for bn in (64, 128))
    yield from grouped_cases(arch)
    yield from tuned_cases(arch)


def grouped_cases(arch: str) -> Iterator[MatmulCase]:
    """The launches for packed experts: the smallest and the largest common block."""
    listed = [case_of(arch, "fp16", 128, True, 16, 64, split=1), case_of(arch, "bf16", 32, False, 64, 128, split=1)]
    listed.append(case_of(arch, "fp16", 128, True, 16, 64, bits=8, split=1))
    yield from (replace(case, grouped=True) for case in listed)


def tuned_cases(arch: str, folder: Path = TUNED) -> list[MatmulCase]:
    """The launches of the tables of an architecture, each once."""
    rows = [row for table in tables_of(arch, folder) for row in rows_of(table["rows"])]
    listed = [
        MatmulCase(arch, SHORT[row.dtype], row.group, symmetric, launch_of(row, form_of(arch, row.dtype)), row.bits)
        for row in rows
        for symmetric in (True, False)
    ]
    return list(dict.fromkeys(listed))


def few_cases(arch: str) -> Iterator[MatmulCase | DequantCase]:
    """The launches that CI has time for: those of the design, and each architecture's extremes."""
    yield DequantCase(arch, "fp16", 4, 128, True)
    yield DequantCase(arch, "bf16", 3, 32, False)
    sizes = buckets(arch)
    if arch == "sm_90":
        yield from (case_of(arch, "fp16", 128, True, bm, bn) for bm in sizes for bn in (64, 128))
        yield case_of(arch, "fp16", 128, True, 16, 64, "portable")
    else:
        yield from (case_of(arch, "fp16", 128, True, 16, bn) for bn in (64, 128))
    yield from (case_of(arch, "bf16", 32, False, bm, bn) for bm, bn in ((16, 64), (sizes[-1], 128)))
    yield case_of(arch, "fp16", 128, True, 16, 64, split=1)
    yield case_of(arch, "fp16", 128, True, 16, 64, bits=8)
    yield case_of(arch, "bf16", 128, False, sizes[-1], 128, bits=8)
    yield next(grouped_cases(arch))


def case_of(
    arch: str,
    dtype: str,
    group: int,
    symmetric: bool,
    bm: int,
    bn: int,
    form: str | None = None,
    bits: int = 4,
    split: int = 4,
) -> MatmulCase:
    """A case with the warps and stages of the rules."""
    form = form or form_of(arch, LONG[dtype])
    launch = Launch(bm, bn, warps_of(arch, bm, bn), stages_of(arch, bits), split, form)
    return MatmulCase(arch, dtype, group, symmetric, launch, bits)


def failures(case: MatmulCase | DequantCase, code: MachineCode, version: str) -> list[str]:
    """The limits that a compiled case exceeds, as text with the value and the limit. version: of Triton."""
    failed = []
    if code.stack:
        failed.append(f"stack {code.stack}")
    if code.shared > SHARED[case.arch] * 1024:
        failed.append(f"smem {code.shared} > {SHARED[case.arch]} KB")
    if code.conversions:
        failed.append(f"{code.conversions} integer conversions")
    if isinstance(case, MatmulCase):
        failed += _loop_failures(case, code)
    limit = most_per_weight(case, version)
    if limit is not None and code.per_weight > limit:
        failed.append(f"{code.per_weight} instructions per weight > {limit}")
    return failed


def _loop_failures(case: MatmulCase, code: MachineCode) -> list[str]:
    """The product, loads and stores in the loop. AMD's load pipeline goes through registers to shared memory by design."""
    failed = []
    # Triton 3.6 pads 8 rows to mma.sync's 16 columns, where 3.9 has a wgmma of 8.
    expected = PRODUCT.get(case.arch, "HMMA")
    if code.product != expected and not (case.launch.bm == 8 and code.product == "HMMA"):
        failed.append(f"no {expected}: {code.product}")
    if case.arch.startswith("gfx"):
        return failed
    # Scales and zero points of a group are words of 4 bytes; any other narrow load is of the weights or x.
    metas = {0: 0, 128: 1, 64: 2, 32: 4}[case.group] * (1 if case.symmetric else 2)
    if case.group == 128:
        metas += 1  # Triton 3.6 copies some blocks' scales in two pieces
    if code.narrow > metas:
        failed.append(f"{code.narrow} narrow loads > {metas}")
    # sm_100 reads operands from shared or tensor memory, not from registers: 64 rows are stored to shared memory.
    if code.stored and case.arch != "sm_100":
        failed.append(f"{code.stored} stores to shared memory")
    return failed


def most_per_weight(case: MatmulCase | DequantCase, version: str) -> float | None:
    """The limit of a case in instructions per weight; None if nothing is known of this version of Triton."""
    design = None
    if isinstance(case, DequantCase):
        design = DEQUANT if case.arch == "sm_90" else None
    elif (case.arch, case.dtype, case.bits, case.group, case.symmetric) == ("sm_90", "fp16", 4, 128, True):
        exception = EXCEPTIONS.get((case.launch.bm, case.launch.bn), 0.0)
        design = max(exception, DESIGN[case.launch.form])
    reached = _limits().get(version, {}).get(key(case))
    return min((limit for limit in (design, reached) if limit is not None), default=None)


def key(case: MatmulCase | DequantCase) -> str:
    """The name of a case in `limits.json`."""
    zeros = "symmetric" if case.symmetric else "zeros"
    what = f"{case.bits} bits dequantized"
    if isinstance(case, MatmulCase):
        what = f"{'grouped ' if case.grouped else ''}{'' if case.bits == 4 else f'int{case.bits} '}{case.launch}"
    return f"{case.arch} {case.dtype} g{case.group} {zeros} {what}"


@cache
def _limits() -> dict[str, dict[str, float]]:
    limits: dict[str, dict[str, float]] = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    return limits


def lower_limits(rows: list[tuple[MatmulCase | DequantCase, MachineCode]], version: str) -> None:
    """Write results to `limits.json` that are lower than its entry, or have none."""
    limits = {name: dict(values) for name, values in _limits().items()}
    own = limits.setdefault(version, {})
    for case, code in rows:
        reached = round(code.per_weight + SLACK, 2)
        own[key(case)] = min(reached, own.get(key(case), reached))
    ordered = {name: dict(sorted(limits[name].items())) for name in sorted(limits)}
    LIMITS.write_text(json.dumps(ordered, indent=1) + "\n")
