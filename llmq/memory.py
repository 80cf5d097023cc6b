"""Peak memory of this process, and sizes as text."""

from __future__ import annotations

import sys


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
