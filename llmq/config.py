"""Configuration of a run: plain values, checked once, without torch.

`QuantConfig` holds everything besides the model and the calibration text that decides the bytes of a checkpoint.
`Calibration` says which text is used and how much of it. Both are frozen, check the type and the range of every value,
and raise one-line errors.

`METHODS` is the only table of methods. It names functions by import path, so that `--help` needs no torch; `resolve`
imports one of them. A new method or transform is one file and one row of the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

from llmq.errors import LlmqError

BITS = (2, 3, 4, 8)
SCALES = ("minmax", "search")
DTYPES = ("auto", "bfloat16", "float16", "float32")
FALLBACK_GROUP_SIZES = (128, 64, 32)
PER_CHANNEL = -1
DEFAULT_METHOD = "awq+gptq"  # the most accurate by measurement; takes 1.5 times as long as GPTQ
SELF = "self"  # the dataset that the model generates
SEEDS = 2**64  # torch's generators take seeds below this


@dataclass(frozen=True)
class Method:
    """One row of the method table: what `--method NAME` stands for.

    Fields:
        name: the name on the command line and in checkpoints.
        transform: import path of the `llmq.transforms.base.Transform` that changes a block before its linears are
            rounded; None for no transform.
        rounding: import path of the `llmq.methods.base.Rounding`.
        default_scales: the value of `QuantConfig.scales` if none is given.
        calibrated: whether the method needs calibration text.
        ordered: whether columns are rounded in activation order, which checkpoints record.
        summary: one line for `--help`.
    """

    name: str
    transform: str | None
    rounding: str
    default_scales: str
    calibrated: bool
    ordered: bool
    summary: str


METHODS = (
    Method(
        name="rtn",
        transform=None,
        rounding="llmq.methods.rtn:rtn",
        default_scales="minmax",
        calibrated=False,
        ordered=False,
        summary="round to nearest: no data, takes seconds, the baseline",
    ),
    Method(
        name="gptq",
        transform=None,
        rounding="llmq.methods.gptq:gptq",
        default_scales="search",
        calibrated=True,
        ordered=True,
        summary="second-order rounding with error feedback (Frantar et al., arXiv 2210.17323)",
    ),
    Method(
        name="awq",
        transform="llmq.transforms.awq:awq",
        rounding="llmq.methods.rtn:rtn",
        default_scales="search",
        calibrated=True,
        ordered=False,
        summary="scales salient channels up before rounding (Lin et al., arXiv 2306.00978)",
    ),
    Method(
        name="awq+gptq",
        transform="llmq.transforms.awq:awq",
        rounding="llmq.methods.gptq:gptq",
        default_scales="search",
        calibrated=True,
        ordered=True,
        summary="awq, then gptq",
    ),
)


def method(name: str) -> Method:
    """The row of `METHODS` called `name`. Raises `LlmqError` for any other name."""
    for row in METHODS:
        if row.name == name:
            return row
    raise LlmqError(f"method must be one of {', '.join(m.name for m in METHODS)}; got {name!r}")


def resolve(path: str) -> Any:
    """The function with import path `module:name`, as the method table gives it. The module is imported now."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class QuantConfig:
    """How weights are quantized. Raises `LlmqError` for a value of the wrong type or outside the stated range.

    Fields:
        method: `rtn`, `gptq`, `awq` or `awq+gptq` (see `METHODS`).
        bits: bits per weight: 2, 3, 4 or 8. Serving engines read 4 and 8; the command line offers these two.
        group_size: number of consecutive columns that share one scale; -1 for one scale per output channel.
        symmetric: True stores no zero points; False stores one per group.
        scales: `minmax` takes scales from the range of the weights; `search` takes the scale with the least weighted
            error out of a grid of candidates. None is replaced by the method's default.
        ignore: linears that are not quantized, besides the output head. Each entry is an exact module name, a class
            name or `re:REGEX`, as in compressed-tensors. A list is stored as a tuple.
        damping: fraction of the mean of the Hessian's diagonal that is added to the diagonal (GPTQ, and AWQ's search
            for scales). Strictly between 0 and 1.
        dtype: what the source is cast to before it is quantized. `auto` keeps a bfloat16 or float16 source and casts
            float32 and GGUF sources to bfloat16.
        all_experts: calibrate every expert of a mixture on every token, not on those that the router sends to it. The
            experts' forwards and second moments cost as many times more as there are experts for each one chosen.
    """

    method: str = DEFAULT_METHOD
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scales: str | None = None
    ignore: tuple[str, ...] = ()
    damping: float = 0.01
    dtype: str = "auto"
    all_experts: bool = False

    def __post_init__(self) -> None:
        row = method(self.method)
        if self.scales is None:
            object.__setattr__(self, "scales", row.default_scales)
        _check_choice("bits", self.bits, BITS)
        _check_choice("scales", self.scales, SCALES)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_integer("group_size", self.group_size)
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise LlmqError(
                f"group_size must be positive, or {PER_CHANNEL} for one scale per channel; got {self.group_size}"
            )
        for name in ("symmetric", "all_experts"):
            if not isinstance(getattr(self, name), bool):
                raise LlmqError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if isinstance(self.damping, bool) or not isinstance(self.damping, (int, float)) or not 0 < self.damping < 1:
            raise LlmqError(f"damping must be a number strictly between 0 and 1, such as 0.01; got {self.damping!r}")
        object.__setattr__(self, "ignore", _checked_patterns(self.ignore))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. `from_dict` turns them into an equal config."""
        return asdict(self) | {"ignore": list(self.ignore)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The config that `to_dict` wrote. Raises `LlmqError` for unknown keys and for every value that is refused."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise LlmqError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class Calibration:
    """Which text a calibrated method sees. Raises `LlmqError` for a value of the wrong type or outside its range.

    Fields:
        dataset: `builtin` (text that ships with Python), `wikitext2`, `c4`, or the path of a text file. The lines of a
            `.jsonl` file must hold `messages`, which go through the model's chat template. `self` lets the model
            generate the text.
        num_samples: maximum number of windows; fewer are used if the text is shorter.
        seq_len: tokens per window; every window is full.
        seed: decides which windows are drawn or generated; 0 or more, below 2**64.
    """

    dataset: str = "builtin"
    num_samples: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str) or not self.dataset:
            raise LlmqError(
                f"dataset must be a string: builtin, wikitext2, c4, self or the path of a text file; got {self.dataset!r}"
            )
        for name in ("num_samples", "seq_len", "seed"):
            _check_integer(name, getattr(self, name))
        for name in ("num_samples", "seq_len"):
            if getattr(self, name) < 1:
                raise LlmqError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.seed < SEEDS:
            raise LlmqError(f"seed must be at least 0 and below 2**64; got {self.seed}")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, type(allowed[0])) or value not in allowed:
        raise LlmqError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise LlmqError(f"{name} must be an integer; got {value!r}")


def _checked_patterns(ignore: object) -> tuple[str, ...]:
    """`ignore` as a tuple. A string is refused: it would be taken apart into letters."""
    rule = "ignore must be a tuple or list of module names, class names or re:REGEX"
    if isinstance(ignore, str):
        raise LlmqError(f"{rule}; got the string {ignore!r}; write ({ignore!r},)")
    if not isinstance(ignore, (list, tuple)):
        raise LlmqError(f"{rule}; got {ignore!r}")
    for pattern in ignore:
        if not isinstance(pattern, str) or not pattern:
            raise LlmqError(f"{rule}; it holds {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise LlmqError(f"{rule}; {pattern!r} is not a regular expression: {error}") from None
    return tuple(ignore)
