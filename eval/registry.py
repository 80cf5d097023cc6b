"""The table of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmq.errors import LlmqError
from llmq.eval.base import Metric, ModelMetric, TextMetric
from llmq.eval.divergence import DIVERGENCE
from llmq.eval.latency import SPEED
from llmq.eval.perplexity import PERPLEXITY

METRICS: tuple[Metric[Any], ...] = (PERPLEXITY, DIVERGENCE, SPEED)
"""Every metric, in the order of the tables."""


def select_metrics(
    requested: Sequence[str], has_original: bool
) -> tuple[tuple[TextMetric[Any], ...], tuple[ModelMetric[Any], ...]]:
    """The metrics to compute, by kind: all that are not optional and the `requested` ones.

    Without an original, metrics that compare with it are left out. Raises `LlmqError` for a name that no metric has.
    """
    names = [metric.name for metric in METRICS]
    unknown = [name for name in requested if name not in names]
    if unknown:
        raise LlmqError(f"metric must be one of {', '.join(names)}; got {unknown[0]!r}")
    selected = [metric for metric in METRICS if not metric.optional or metric.name in requested]
    text = (metric for metric in selected if isinstance(metric, TextMetric))
    return (
        tuple(metric for metric in text if has_original or not metric.needs_original),
        tuple(metric for metric in selected if isinstance(metric, ModelMetric)),
    )
