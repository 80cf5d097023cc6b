"""Which launches are compiled ahead of time, and what their machine code must look like.

The cases are those that the rules of `llmq.kernels.launch` and the tables in `kernels/tuned/` can choose: every bucket and
width at groups of 128, both dtypes, symmetric and not; other groups at one bucket, since a bucket changes the number of
products and a group the code between them. Split K is compiled in, bias too.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmq.kernels.ahead import Case, Report
from llmq.kernels.launch import BUCKETS, Launch, form_of

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# Bytes of shared memory that one block may have.
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx1100": 64}
# Instructions for each weight in the loop over K, sm_90, triton 3.9: set close above what was reached, and only to fall.
# The design's limit is 3.0 for few rows in float16, symmetric, groups of 128 (reached: 2.92; 2.28 at bn 128).
FEWEST = 3.0
WIDE = -0.5  # bn 128: addresses and waits are shared by twice the weights
PORTABLE = 0.5  # a shift for each pair (reached: 3.33)
BF16 = 0.3  # no high codes without a shift
ZEROS = 0.25  # constants made of each group's zero points
ROWS = {8: 0.0, 16: 0.0, 32: 0.4, 64: 1.15}  # scaling sums: bm / 128 for each weight and group, and copies of x
GROUPS = {0: 0.0, 128: 0.0, 64: 0.4, 32: 1.2}  # sums are scaled twice and four times as often
GROUP_ZEROS = {0: 0.0, 128: 0.0, 64: 0.3, 32: 0.45}


def cases(arch: str) -> Iterator[Case]:
    """The launches of an architecture."""
    stages = 2 if arch.startswith("gfx") else 4
    for dtype, name in (("fp16", "float16"), ("bf16", "bfloat16")):
        for symmetric in (True, False):
            form = form_of(arch, name)
            for bm in BUCKETS:
                for bn in (64, 128):
                    warps = 8 if bm == 64 and bn == 128 else 4
                    yield Case(arch, dtype, 128, symmetric, Launch(bm, bn, warps, stages, 4, form))
            for group in (0, 64, 32):
                yield Case(arch, dtype, group, symmetric, Launch(16, 64, 4, stages, 4, form))
        if arch == "sm_90":
            for bn in (64, 128):
                yield Case(arch, dtype, 128, True, Launch(16, bn, 4, stages, 4, "portable"))


def most_per_weight(case: Case) -> float:
    """The limit of a case in instructions for each weight."""
    limit = FEWEST + ROWS[case.launch.bm] + GROUPS[case.group]
    limit += WIDE if case.launch.bn == 128 else 0.0
    limit += PORTABLE if case.launch.form == "portable" else 0.0
    limit += BF16 if case.dtype == "bf16" else 0.0
    return round(limit if case.symmetric else limit + ZEROS + GROUP_ZEROS[case.group], 2)


def failures(case: Case, report: Report) -> list[str]:
    """The gates that a report fails, in words with the value and the limit.

    Everywhere: nothing in local memory, shared memory within the architecture's, tensor cores used, no conversion of
    integers. The loop's gates hold for sm_90, whose machine code the design was made on.
    """
    found = []
    if report.stack:
        found.append(f"stack {report.stack}")
    if report.shared > SHARED[case.arch] * 1024:
        found.append(f"smem {report.shared} > {SHARED[case.arch]} KB")
    if report.conversions:
        found.append(f"{report.conversions} conversions of integers")
    if report.product == "none":
        found.append("no tensor cores")
    if case.arch == "sm_90":
        found += _loop_failures(case, report)
    return found


def _loop_failures(case: Case, report: Report) -> list[str]:
    found = []
    if case.launch.bm >= 16 and report.product != "HGMMA":
        found.append(f"no wgmma: {report.product}")
    # Scales and zero points of a group are words of 4 bytes; what is narrow besides them is of the weights or x.
    metas = {0: 0, 128: 1, 64: 2, 32: 4}[case.group] * (1 if case.symmetric else 2)
    if report.narrow > metas:
        found.append(f"{report.narrow} narrow loads > {metas}")
    if report.stored:
        found.append(f"{report.stored} stores to shared memory")
    limit = most_per_weight(case)
    if report.per_weight is None or report.per_weight > limit:
        found.append(f"{report.per_weight} instructions a weight > {limit}")
    return found
