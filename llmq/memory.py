"""How much memory this process has used at most."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int | None:
    """Largest resident set of this process since it started, bytes; None on platforms without `resource` (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
