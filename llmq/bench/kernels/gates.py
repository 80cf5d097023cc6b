"""Which launches are compiled ahead of time, and what their machine code must look like.

The cases are those that the rules of `llmq.kernels.launch` choose: every bucket and width at groups of 128, both dtypes,
symmetric and not; other groups, and 8 bits, at the smallest and the largest common block, where registers are fewest and most.
K is split into four, which has more code than more parts or none; that common blocks do without is compiled, too. Bias is in.
And what the measured tables in `tuned/` launch, with zero points and without; and the dequantize kernel at every width.

Two kinds of gates. Rules, the same for every version of Triton: nothing in local memory, shared memory within the
architecture's, its best tensor-core instruction, no integer converted to a float, no narrow load of weights or x, no store
to shared memory in the loop, and the design's instructions for each weight where it has some (`DESIGN`). And a ratchet:
`limits.json` has what each version of Triton reached for each case plus `SLACK`; `check_kernels.py --write` lowers what has
become better and adds what is new, and raises nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llmq.bench.kernels.machine_code import Case, Report, Unpacking
from llmq.kernels.launch import TUNED, Launch, buckets, form_of, shipped, stages_of, warps_of

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# Bytes of shared memory that one block may have.
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx1100": 64}
PRODUCT = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma", "gfx1100": "wmma"}
# sm_90, float16, symmetric, groups of 128: a GPU at its memory's limit has time for 4 instructions a weight.
DESIGN = {"assembly": 3.0, "portable": 4.0}
# ... and what does not reach it, where the rules do not choose it unless N / 64 is odd (bn 64), or two blocks would cost
# more (bm 128: 3.84 to 3.88 for 128 rows against twice 2.71 for 64).
EXEMPT = {(32, 64): 3.1, (64, 64): 3.5, (128, 64): 4.15, (128, 128): 3.9}
# Dequantizing writes 2 bytes for each weight: an H200 at its memory's limit has time for 19 instructions.
UNPACKING = 19.0
SHORT = {"float16": "fp16", "bfloat16": "bf16"}
LONG = {short: long for long, short in SHORT.items()}
SLACK = 0.03
LIMITS = Path(__file__).resolve().parent / "limits.json"


def cases(arch: str) -> Iterator[Case | Unpacking]:
    """The launches of an architecture."""
    for bits in (2, 3, 4, 8):
        yield Unpacking(arch, "fp16", bits, 128, True)
        yield Unpacking(arch, "bf16", bits, 32, False)
        yield Unpacking(arch, "fp16", bits, 0, False)
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
    yield from tuned_cases(arch)


def tuned_cases(arch: str, folder: Path = TUNED) -> list[Case]:
    """What the tables of an architecture launch, each once."""
    found = [
        Case(arch, SHORT[row.dtype], row.group, symmetric, launch, row.bits)
        for row, launch in shipped(arch, folder)
        for symmetric in (True, False)
    ]
    return list(dict.fromkeys(found))


def few_cases(arch: str) -> Iterator[Case | Unpacking]:
    """Those that CI has time for: the design's own, and for each architecture the extremes."""
    yield Unpacking(arch, "fp16", 4, 128, True)
    yield Unpacking(arch, "bf16", 3, 32, False)
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
) -> Case:
    """A case with the warps and stages of the rules."""
    form = form or form_of(arch, LONG[dtype])
    launch = Launch(bm, bn, warps_of(arch, bm, bn), stages_of(arch, bits), split, form)
    return Case(arch, dtype, group, symmetric, launch, bits)


def failures(case: Case | Unpacking, report: Report, version: str) -> list[str]:
    """The gates that a report fails, in words with the value and the limit. version: of Triton."""
    found = []
    if report.stack:
        found.append(f"stack {report.stack}")
    if report.shared > SHARED[case.arch] * 1024:
        found.append(f"smem {report.shared} > {SHARED[case.arch]} KB")
    if report.conversions:
        found.append(f"{report.conversions} conversions of integers")
    if isinstance(case, Case):
        found += _loop_failures(case, report)
    limit = most_per_weight(case, version)
    if limit is not None and report.per_weight > limit:
        found.append(f"{report.per_weight} instructions a weight > {limit}")
    return found


def _loop_failures(case: Case, report: Report) -> list[str]:
    """The product, loads and stores in the loop. AMD's pipeline goes through registers to shared memory by design."""
    found = []
    # Triton 3.6 pads 8 rows to mma.sync's 16 columns, where 3.9 has a wgmma of 8.
    wanted = PRODUCT.get(case.arch, "HMMA")
    if report.product != wanted and not (case.launch.bm == 8 and report.product == "HMMA"):
        found.append(f"no {wanted}: {report.product}")
    if case.arch.startswith("gfx"):
        return found
    # Scales and zero points of a group are words of 4 bytes; what is narrow besides them is of the weights or x.
    metas = {0: 0, 128: 1, 64: 2, 32: 4}[case.group] * (1 if case.symmetric else 2)
    if case.group == 128:
        metas += 1  # Triton 3.6 copies some blocks' scales in two pieces
    if report.narrow > metas:
        found.append(f"{report.narrow} narrow loads > {metas}")
    # sm_100's operands are in shared or tensor memory, not in registers: 64 rows are stored to the former.
    if report.stored and case.arch != "sm_100":
        found.append(f"{report.stored} stores to shared memory")
    return found


def most_per_weight(case: Case | Unpacking, version: str) -> float | None:
    """The limit of a case in instructions for each weight; None where nothing is known of this version of Triton."""
    design = None
    if isinstance(case, Unpacking):
        design = UNPACKING if case.arch == "sm_90" else None
    elif (case.arch, case.dtype, case.bits, case.group, case.symmetric) == ("sm_90", "fp16", 4, 128, True):
        exempt = EXEMPT.get((case.launch.bm, case.launch.bn), 0.0)
        design = max(exempt, DESIGN[case.launch.form])
    reached = _limits().get(version, {}).get(key(case))
    return min((limit for limit in (design, reached) if limit is not None), default=None)


def key(case: Case | Unpacking) -> str:
    """The name of a case in `limits.json`."""
    zeros = "symmetric" if case.symmetric else "zeros"
    what = f"{case.bits} bits dequantized"
    if isinstance(case, Case):
        what = f"{'' if case.bits == 4 else f'int{case.bits} '}{case.launch}"
    return f"{case.arch} {case.dtype} g{case.group} {zeros} {what}"


@cache
def _limits() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    return found


def ratchet(rows: list[tuple[Case | Unpacking, Report]], version: str) -> None:
    """Write what was reached to `limits.json`, where that is less than what is there or nothing is."""
    limits = {name: dict(found) for name, found in _limits().items()}
    kept = limits.setdefault(version, {})
    for case, report in rows:
        reached = round(report.per_weight + SLACK, 2)
        kept[key(case)] = min(reached, kept.get(key(case), reached))
    ordered = {name: dict(sorted(limits[name].items())) for name in sorted(limits)}
    LIMITS.write_text(json.dumps(ordered, indent=1) + "\n")
