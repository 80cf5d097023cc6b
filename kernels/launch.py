"""(problem, device) -> launch configuration of the few-rows kernel: a pure function of numbers and names.

If there is a measured table for the device, it decides; otherwise the rules below do, which count and do not measure.
Nothing is tuned at run time. A table is a JSON file in `kernels/tuned/`:

    {"arch": "sm_90", "processors": 132, "device": "NVIDIA H100 ...", "measured": "date, versions, command",
     "rows": [{"dtype": "float16", "group": 128, "bucket": 16, "n": 4096, "k": 4096,
               "bits": 4, "bn": 64, "warps": 4, "stages": 4, "split": 4, "us": 5.1}, ...]}

`scripts/tune_kernels.py` writes tables. They also hold the discarded configurations and the crossover times.

Of the rows with the same dtype, bits, group and bucket, the nearest one is used: the one with the least
|log2 n'/n| + |log2 k'/k|, at most 2 (sizes within a factor of 4 in all). Ties go to the larger n, then the larger k. The row
must also fit: bn divides the padded N, and every part of a split has a tile. `group` 0 is per channel.

The rules follow the machine code that `scripts/check_kernels.py` reads. bm: the bucket. bn: 128 if the padded N has an even
number of tiles and either every processor still gets a block, or bm is at least 32, or the device is sm_100 (a wide block
needs a quarter (sm_90) to a half (sm_100) fewer instructions per weight); else 64. split: doubled while there are fewer than
two blocks per processor and every part keeps `MIN_TILES` tiles. warps: `warps_of`. Left out: a choice of the unpacking form
other than by vendor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

BUCKETS = (8, 16, 32, 64)
LARGE_BUCKETS = (128,)  # sm_90 and sm_100 only
MIN_TILES = 4  # of K in each part of a split
MAX_SPLIT = 16
MAX_DISTANCE = 2.0
TUNED = Path(__file__).resolve().parent / "tuned"


@dataclass(frozen=True)
class Launch:
    """A launch configuration of `wna16_swap`."""

    bm: int
    """Rows of x in a block."""
    bn: int
    """Rows of the weight in a block."""
    warps: int
    """Warps of a block."""
    stages: int
    """Buffers of the load pipeline."""
    split: int
    """Parts of K."""
    form: str
    """How words are unpacked: assembly, portable or upcast (`llmq.kernels._unpack`)."""

    def __str__(self) -> str:
        return f"bm{self.bm} bn{self.bn} split{self.split} stages{self.stages} warps{self.warps} {self.form}"


@dataclass(frozen=True)
class TunedLaunch:
    """The measured best configuration of one shape: a row of a table."""

    dtype: str
    """Of x: float16 or bfloat16."""
    group: int
    """Columns per scale; 0 per channel."""
    bucket: int
    """Rows of x in a block."""
    n: int
    """Rows of the weight."""
    k: int
    """Columns of the weight."""
    bn: int
    """As in `Launch`, like the next three."""
    warps: int
    stages: int
    split: int
    bits: int = 4
    """Of a weight code."""


@dataclass(frozen=True)
class Device:
    """The properties of a device that decide a configuration."""

    arch: str
    """sm_90, gfx942, ... or `interpreter`."""
    processors: int
    """Streaming multiprocessors or compute units."""
    name: str = ""
    """The driver's name. An H100 and an H200 have the same architecture and 132 processors, but different memory."""


def buckets(arch: str) -> tuple[int, ...]:
    """The numbers of rows of x that a block may have.

    128 needs sums or weights outside the registers of `mma.sync`, and 157 KB of shared memory. AMD's products take 16 rows:
    8 rows would be padded through shared memory, with more registers and instructions than 16.
    """
    if arch.startswith("gfx"):
        return BUCKETS[1:]
    return BUCKETS + LARGE_BUCKETS if arch in ("sm_90", "sm_100") else BUCKETS


def bucket(arch: str, rows: int) -> int:
    """The block size that M rows of x are padded to. An M above the largest one takes several blocks."""
    sizes = buckets(arch)
    return next((size for size in sizes if rows <= size), sizes[-1])


def configure(
    device: Device, dtype: str, group: int, rows: int, n: int, k: int, table: Sequence[TunedLaunch] = (), bits: int = 4
) -> Launch:
    """The configuration for x [rows, k] of `dtype` and a weight [n, k]. group: columns per scale, 0 per channel."""
    if rows < 1:
        raise ValueError(f"a launch needs at least 1 row of x; got {rows}")
    size, tiles, form = bucket(device.arch, rows), -(-k // 128), form_of(device.arch, dtype)
    tuned = nearest(table, dtype, group, size, n, k, bits)
    if tuned is not None:
        return launch_of(tuned, form)
    row_tiles, down = -(-n // 64), -(-rows // size)
    prefer_wide = size >= 32 or device.arch == "sm_100" or row_tiles // 2 * down >= device.processors
    wide = prefer_wide and row_tiles % 2 == 0
    bn = 128 if wide else 64
    blocks = (row_tiles // 2 if wide else row_tiles) * down
    split = 1
    while split < MAX_SPLIT and blocks * split < 2 * device.processors and tiles >= 2 * split * MIN_TILES:
        split *= 2
    return Launch(size, bn, warps_of(device.arch, size, bn), stages_of(device.arch, bits), split, form)


def describe(
    device: Device, dtype: str, group: int, rows: int, n: int, k: int, table: Sequence[TunedLaunch], bits: int = 4
) -> str:
    """`configure` as text, and whether the configuration was measured or follows the rules."""
    measured = nearest(table, dtype, group, bucket(device.arch, rows), n, k, bits) is not None
    launch = configure(device, dtype, group, rows, n, k, table, bits)
    return f"{launch} ({'measured' if measured else 'by rule'})"


def nearest(
    table: Sequence[TunedLaunch], dtype: str, group: int, size: int, n: int, k: int, bits: int = 4
) -> TunedLaunch | None:
    """The measured row used for a shape, or None if no row is near enough or fits."""
    candidates = []
    for row in table:
        fits = -(-n // 64) % (row.bn // 64) == 0 and row.split <= -(-k // 128)
        if (row.dtype, row.bits, row.group, row.bucket) == (dtype, bits, group, size) and fits:
            distance = abs(log2(row.n / n)) + abs(log2(row.k / k))
            if distance <= MAX_DISTANCE:
                candidates.append((distance, -row.n, -row.k, row))
    return min(candidates, key=lambda candidate: candidate[:3])[3] if candidates else None


def form_of(arch: str, dtype: str) -> str:
    """How words are unpacked: assembly on NVIDIA, plain Triton elsewhere, bfloat16 through float32 in the interpreter."""
    if arch.startswith("sm_"):
        return "assembly"
    return "upcast" if arch == "interpreter" and dtype == "bfloat16" else "portable"


def warps_of(arch: str, bm: int, bn: int) -> int:
    """The fewest warps with which a block spills no registers. With more warps each one shares fewer weights.

    sm_90 and sm_100 keep weights or sums where `mma.sync` has no room, and need 4 warps up to 64 rows. RDNA's waves have half
    the lanes of CDNA's: with as few warps they spilled 213 to 437 registers.
    """
    full = bm * bn >= 64 * 128
    if arch.startswith(("gfx10", "gfx11", "gfx12")):
        return 16 if full else 4 if bn == 64 and bm <= 32 else 8
    if arch in ("sm_90", "sm_100"):
        return 8 if bm * bn > 64 * 128 else 4
    return 8 if full else 4


def compiler_options(arch: str, launch: Launch) -> dict[str, Any]:
    """Triton's compiler options for a launch, the same ahead of time and at run time.

    maxnreg: without it ptxas spills to fit one more block into a processor (62 accesses of local memory on sm_100).
    enable_fp_fusion: multiply-add; its default differs between versions of Triton.
    """
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return options | {"maxnreg": 255} if arch.startswith("sm_") else options


def stages_of(arch: str, bits: int) -> int:
    """Buffers of the load pipeline. AMD's compiler keeps them in registers and is built for 2.

    Three buffers of 8 bits hold more bytes than four of 4 bits; four would exceed the 99 KB of sm_89 and sm_120.
    """
    return 2 if arch.startswith("gfx") else 4 if bits == 4 else 3


@cache
def table_of(device: Device, folder: Path = TUNED) -> tuple[TunedLaunch, ...]:
    """The measured rows for a device: its own table, else one of the same architecture and number of processors, else ()."""
    tables = [table for table in tables_of(device.arch, folder) if table["processors"] == device.processors]
    tables.sort(key=lambda table: table.get("device") != device.name)  # stable: the device's own table first
    return rows_of(tables[0]["rows"]) if tables else ()


def tables_of(arch: str, folder: Path = TUNED) -> list[dict[str, Any]]:
    """The tables of an architecture, as JSON values, in the order of their file names."""
    tables = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [table for table in tables if table["arch"] == arch]


def launch_of(row: TunedLaunch, form: str) -> Launch:
    """The launch of a row. form: of unpacking."""
    return Launch(row.bucket, row.bn, row.warps, row.stages, row.split, form)


def rows_of(rows: Sequence[dict[str, Any]]) -> tuple[TunedLaunch, ...]:
    """The rows of a table from its JSON, which has more keys than a launch needs."""
    return tuple(TunedLaunch(**{name: row[name] for name in TunedLaunch.__dataclass_fields__}) for row in rows)
