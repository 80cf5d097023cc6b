"""The table of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmq.errors import LlmqError
from llmq.eval.base import Metric
from llmq.eval.divergence import DIVERGENCE
from llmq.eval.latency import SPEED
from llmq.eval.perplexity import PERPLEXITY

METRICS: tuple[Metric[Any], ...] = (PERPLEXITY, DIVERGENCE, SPEED)
"""Every metric, in the order of the tables."""


def select_metrics(requested: Sequence[str]) -> tuple[Metric[Any], ...]:
    """All metrics that are not optional, and the `requested` ones.

    Raises `LlmqError` for a name that no metric has.
    """
    names = [metric.name for metric in METRICS]
    unknown = [name for name in requested if name not in names]
    if unknown:
        raise LlmqError(f"metric must be one of {', '.join(names)}; got {unknown[0]!r}")
    return tuple(metric for metric in METRICS if not metric.optional or metric.name in requested)
