"""How much memory this process has used, how much there is, sizes as text, and giving back what was freed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")
MAPPED = 4 << 20
M_MMAP_THRESHOLD = -3  # malloc.h


def peak_rss_bytes() -> int | None:
    """Largest resident set of this process since it started, in bytes; None on platforms without `resource` (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_bytes(count: int | None) -> str:
    """A size in decimal units, as "1.23 GB"; "-" for None."""
    from rich.filesize import decimal

    return "-" if count is None else decimal(count, precision=2)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be allocated on `device` now, bytes; None where the platform does not tell.

    On the host: what the system can give without swapping, within the limit of this process's control group.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type not in ("cpu", "meta"):
        return None
    try:
        import psutil
    except ImportError:
        return None
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - int(used)))


def map_large_tensors() -> None:
    """Have every tensor of 4 MiB or more in pages of its own, which go back to the system when it is freed. Lasts for the
    process: for programs, not for libraries.

    glibc raises that limit as it goes, up to 32 MB, and the heap that smaller tensors then live in is fragmented block after
    block: a peak of 1.79 GB in the place of 1.52 for a Llama of 3 GB and 28 blocks.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, MAPPED)


def trim_heap() -> None:
    """Give freed memory at the end of the heap back to the system."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None), name, None)  # musl has none
        if function is not None:
            function(*arguments)
