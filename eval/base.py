"""What a metric is: one row that says what it needs, how it is computed and how its table looks.

    TextMetric    from the logits of a text's windows; all text metrics share one pass over them (`llmq.eval.scoring`)
    ModelMetric   from loaded models alone: all models are measured together

The rows are listed in `llmq.eval.registry.METRICS`. The evaluation, the table on the terminal and the JSON line follow
from them. A new metric is one file with its result and its row, and one entry in that tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn


class Result(Protocol):
    """What a metric says about one model: a frozen dataclass."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values. No two metrics use the same key: `evaluate` prints them all in one object."""
        ...


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Slab:
    """Logits of consecutive positions of one window, the window's last position left out: it predicts nothing.

    Fields:
        window: index of the window in its batch.
        logits: floating [n, vocabulary].
        targets: int64 [n], the ids that follow the positions, on the logits' device.
    """

    window: int
    logits: Tensor
    targets: Tensor


@dataclass(frozen=True)
class ScoredText:
    """The tokens that a pass has scored.

    Fields:
        ids: int64 [windows, tokens], on the CPU.
        tokenizer: the model's tokenizer, or None.
        notes: deviations from what was requested, one line each.
        begin: number of tokens that every window begins with and that are not of the text: a BOS.
    """

    ids: Tensor
    tokenizer: Any
    notes: tuple[str, ...]
    begin: int = 0


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column of a metric's table.

    Fields:
        heading: the column's name.
        cell: (this model's result, the first model's result) -> text.
    """

    heading: str
    cell: Callable[[R, R], str]


def _no_comparison(first: Any, other: Any) -> dict[str, Any]:
    return {}


def _no_notes(results: Sequence[Any]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Metric(Generic[R]):
    """What both kinds of metric have.

    Fields:
        name: in `METRICS` and on the command line.
        optional: computed only if requested by name.
        columns: of its table, without the model's name.
        comparison: (first model's result, another model's result) -> JSON values that are added to the other's.
        notes: (results of all models) -> lines to print below the table.
    """

    name: str
    columns: tuple[Column[R], ...]
    optional: bool = False
    comparison: Callable[[R, R], dict[str, Any]] = _no_comparison
    notes: Callable[[Sequence[R]], tuple[str, ...]] = _no_notes


@dataclass(frozen=True, kw_only=True)
class TextMetric(Metric[R]):
    """A metric that is computed from the logits of a text's windows.

    Fields:
        needs_original: whether it compares the model with the original that it was made from.
        sums: (the model's slab, the original's slab or None) -> one or more sums over the slab's positions.
        check: (index of a window, the mean of each sum over the window's positions); raises `LlmqError` for unusable ones.
        summarize: (scored text, for each window its means) -> the result.
    """

    sums: Callable[[Slab, Slab | None], tuple[float, ...]]
    check: Callable[[int, tuple[float, ...]], None]
    summarize: Callable[[ScoredText, Sequence[tuple[float, ...]]], R]
    needs_original: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelMetric(Metric[R]):
    """A metric that is computed from loaded models alone.

    Fields:
        measure: models -> one result per model, in order.
        title: (the first model's result) -> title of the table.
    """

    measure: Callable[[Sequence[nn.Module]], Sequence[R]]
    title: Callable[[R], str]


def decimals(value: float | None, places: int = 3) -> str:
    """A number for a table cell; "-" for None."""
    return "-" if value is None else f"{value:.{places}f}"
