"""(problem, device) -> launch configuration of the few-rows kernel: a pure function on numbers and names.

A measured table decides where there is one for the device; else the rules below, which count and do not measure. Nothing
is tuned at run time. A table is a JSON file in `kernels/tuned/`:

    {"arch": "sm_90", "processors": 132, "device": "NVIDIA H100 ...", "measured": "date, versions, command",
     "rows": [{"dtype": "float16", "group": 128, "bucket": 16, "n": 4096, "k": 4096,
               "bits": 4, "bn": 64, "warps": 4, "stages": 4, "split": 4, "us": 5.1}, ...]}

`scripts/tune_kernels.py` writes them, with more beside the rows: what was discarded, and crossovers.

The nearest row: of the same dtype, bits, group and bucket, the one with the least |log2 n'/n| + |log2 k'/k|, at most 2 (sizes
within a factor of 4 in all); ties go to the larger n, then k. It must also fit: bn divides the padded N, and every part
of a split has a tile. `group` 0 is per channel.

The rules, where nothing was measured, are made of the machine code that `scripts/check_kernels.py` reads. bm: the bucket.
bn: 128 where the padded N has an even number of tiles and either every processor still gets a block, or bm is 32 or more,
or the device is sm_100: a wide block has a quarter (sm_90) to a half (sm_100) less instructions a weight. Else 64. split:
doubled while blocks fill less than two on each processor and every part keeps `LEAST_TILES` tiles. warps: `warps_of`.
Left out: a form of unpacking other than by vendor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

BUCKETS = (8, 16, 32, 64)
MIDDLE = (128,)
LEAST_TILES = 4
MOST_SPLIT = 16
FARTHEST = 2.0
TUNED = Path(__file__).resolve().parent / "tuned"


@dataclass(frozen=True)
class Launch:
    """How wna16_swap is launched. bm, bn: rows of x and of the weight in a block. split: parts of K. form: of unpacking."""

    bm: int
    bn: int
    warps: int
    stages: int
    split: int
    form: str

    def __str__(self) -> str:
        return f"bm{self.bm} bn{self.bn} split{self.split} stages{self.stages} warps{self.warps} {self.form}"


@dataclass(frozen=True)
class Row:
    """A measured configuration of one shape."""

    dtype: str
    group: int
    bucket: int
    n: int
    k: int
    bn: int
    warps: int
    stages: int
    split: int
    bits: int = 4


@dataclass(frozen=True)
class Device:
    """What a configuration depends on. arch: sm_90, gfx942, ... or `interpreter`. processors: SMs or compute units.

    name: as its driver tells it: an H100 and an H200 have one architecture and 132 processors, but other memories.
    """

    arch: str
    processors: int
    name: str = ""


def buckets(arch: str) -> tuple[int, ...]:
    """The blocks of x's rows.

    128 needs sums or weights outside of the registers of `mma.sync`, and 157 KB of shared memory. AMD's products take 16
    rows: 8 are padded through shared memory, with more registers and instructions than 16 have.
    """
    if arch.startswith("gfx"):
        return BUCKETS[1:]
    return BUCKETS + MIDDLE if arch in ("sm_90", "sm_100") else BUCKETS


def bucket(arch: str, rows: int) -> int:
    """The block that M rows of x are padded to; M beyond the last takes several."""
    sizes = buckets(arch)
    return next((size for size in sizes if rows <= size), sizes[-1])


def configure(
    device: Device, dtype: str, group: int, rows: int, n: int, k: int, table: Sequence[Row] = (), bits: int = 4
) -> Launch:
    """The configuration for x [rows, k] of `dtype` and a weight [n, k]. group: columns per scale, 0 per channel."""
    if rows < 1:
        raise ValueError(f"there is nothing to launch for {rows} rows")
    size, tiles, form = bucket(device.arch, rows), -(-k // 128), form_of(device.arch, dtype)
    found = nearest(table, dtype, group, size, n, k, bits)
    if found is not None:
        return _launch_of(found, form)
    row_tiles, down = -(-n // 64), -(-rows // size)
    sparing = size >= 32 or device.arch == "sm_100" or row_tiles // 2 * down >= device.processors
    wide = sparing and row_tiles % 2 == 0
    bn = 128 if wide else 64
    blocks = (row_tiles // 2 if wide else row_tiles) * down
    split = 1
    while split < MOST_SPLIT and blocks * split < 2 * device.processors and tiles >= 2 * split * LEAST_TILES:
        split *= 2
    return Launch(size, bn, warps_of(device.arch, size, bn), stages_of(device.arch, bits), split, form)


def told(device: Device, dtype: str, group: int, rows: int, n: int, k: int, table: Sequence[Row], bits: int = 4) -> str:
    """`configure` in words, and whether it was measured or follows the rules."""
    measured = nearest(table, dtype, group, bucket(device.arch, rows), n, k, bits) is not None
    launch = configure(device, dtype, group, rows, n, k, table, bits)
    return f"{launch} ({'measured' if measured else 'by rule'})"


def nearest(table: Sequence[Row], dtype: str, group: int, size: int, n: int, k: int, bits: int = 4) -> Row | None:
    """The measured row that stands for a shape, or None where none is near enough or fits."""
    near = []
    for row in table:
        fits = -(-n // 64) % (row.bn // 64) == 0 and row.split <= -(-k // 128)
        if (row.dtype, row.bits, row.group, row.bucket) == (dtype, bits, group, size) and fits:
            distance = abs(log2(row.n / n)) + abs(log2(row.k / k))
            if distance <= FARTHEST:
                near.append((distance, -row.n, -row.k, row))
    return min(near, key=lambda found: found[:3])[3] if near else None


def form_of(arch: str, dtype: str) -> str:
    """How words are unpacked: assembly on NVIDIA, plain Triton elsewhere, bfloat16 through float32 in the interpreter."""
    if arch.startswith("sm_"):
        return "assembly"
    return "upcast" if arch == "interpreter" and dtype == "bfloat16" else "portable"


def warps_of(arch: str, bm: int, bn: int) -> int:
    """The fewest warps of a block that spill no registers: more of them share fewer weights each.

    sm_90 and sm_100 keep weights or sums where `mma.sync` has no room, and 4 suffice up to 64 rows. RDNA's waves have half
    the lanes of CDNA's: with as few of them it spilled 213 to 437 registers.
    """
    full = bm * bn >= 64 * 128
    if arch.startswith(("gfx10", "gfx11", "gfx12")):
        return 16 if full else 4 if bn == 64 and bm <= 32 else 8
    if arch in ("sm_90", "sm_100"):
        return 8 if bm * bn > 64 * 128 else 4
    return 8 if full else 4


def compiler_options(arch: str, launch: Launch) -> dict[str, Any]:
    """What Triton's compiler is told for a launch, ahead of time as at run time.

    maxnreg: left to itself ptxas spills to fit one block more into a processor (62 accesses of local memory on sm_100).
    enable_fp_fusion: multiply-add; its default differs between versions of Triton.
    """
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return options | {"maxnreg": 255} if arch.startswith("sm_") else options


def stages_of(arch: str, bits: int) -> int:
    """Buffers in the ring. AMD's compiler keeps them in registers, and 2 is what it is built for.

    Three of 8 bits hold more bytes than four of 4, and four would be more than the 99 KB that sm_89 and sm_120 have.
    """
    return 2 if arch.startswith("gfx") else 4 if bits == 4 else 3


@cache
def table_of(device: Device, folder: Path = TUNED) -> tuple[Row, ...]:
    """The measured rows for a device: of its own table, else of one with its architecture and number of processors; else ()."""
    fitting = [table for table in _tables(folder, device.arch) if table["processors"] == device.processors]
    fitting.sort(key=lambda table: table.get("device") != device.name)  # stable: its own first
    return rows_of(fitting[0]["rows"]) if fitting else ()


def shipped(arch: str, folder: Path = TUNED) -> Iterator[tuple[Row, Launch]]:
    """Every row of an architecture's tables, and what it launches."""
    for table in _tables(folder, arch):
        for row in rows_of(table["rows"]):
            yield row, _launch_of(row, form_of(arch, row.dtype))


def _tables(folder: Path, arch: str) -> list[dict[str, Any]]:
    tables = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [table for table in tables if table["arch"] == arch]


def _launch_of(row: Row, form: str) -> Launch:
    return Launch(row.bucket, row.bn, row.warps, row.stages, row.split, form)


def rows_of(listed: Sequence[dict[str, Any]]) -> tuple[Row, ...]:
    """The rows of a table as JSON has them, which tell more than a launch needs."""
    return tuple(Row(**{name: values[name] for name in Row.__dataclass_fields__}) for values in listed)
