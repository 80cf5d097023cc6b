"""What is asked of a quantization: values only, validated once, no torch.

`QuantConfig` is everything that decides the bytes of a checkpoint besides the model and the calibration text;
`Calibration` is which text, and how much of it. Both are frozen and refuse unknown keys. The method table lives here
so that `--help` needs no torch; `llmq.methods` maps the same names to functions, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from llmq.errors import LlmqError

BITS = (2, 3, 4, 8)
SCALES = ("minmax", "search")
DTYPES = ("auto", "bfloat16", "float16", "float32")
FALLBACK_GROUP_SIZES = (128, 64, 32)
PER_CHANNEL = -1
DEFAULT_METHOD = "awq+gptq"  # the best of them by measurement, for 1.5 times the time of GPTQ
SELF = "self"  # the dataset that the model writes


@dataclass(frozen=True)
class Method:
    """One row of the method table: what `--method NAME` stands for.

    transform: what is done to a block before it is rounded (`llmq.transforms`); None for nothing. rounding: `llmq.methods`.
    default_scales: `--scales` where it is not given. calibrated: whether it needs text. ordered: whether columns are
    rounded in the order of their activations (checkpoints record it).
    """

    name: str
    transform: str | None
    rounding: str
    default_scales: str
    calibrated: bool
    ordered: bool
    summary: str


METHODS = (
    Method("rtn", None, "rtn", "minmax", False, False, "round to nearest: no data, seconds, the baseline"),
    Method(
        *("gptq", None, "gptq", "search", True, True),
        "second-order rounding with error feedback (Frantar et al., arXiv 2210.17323)",
    ),
    Method(
        *("awq", "awq", "rtn", "search", True, False),
        "salient channels scaled up before rounding (Lin et al., arXiv 2306.00978)",
    ),
    Method("awq+gptq", "awq", "gptq", "search", True, True, "awq, then gptq"),
)


def method(name: str) -> Method:
    """The row of the method table called `name`. Raises `LlmqError` for any other name."""
    for row in METHODS:
        if row.name == name:
            return row
    raise LlmqError(f"method must be one of {', '.join(m.name for m in METHODS)}; got {name!r}")


@dataclass(frozen=True)
class QuantConfig:
    """How weights are quantized.

    method: `rtn`, `gptq`, `awq` or `awq+gptq` (`METHODS`).
    bits: 2, 3, 4 or 8. (Serving engines read 4 and 8, which the command line offers.)
    group_size: columns that share one scale; -1 for one scale per output channel.
    symmetric: True stores no zero point; False stores one per group.
    scales: `minmax` (from the range of the weights) or `search` (least weighted error over a grid of candidates);
        None takes the method's default.
    ignore: linears left as they are, besides the output head: an exact module name, a class name or `re:REGEX`
        (compressed-tensors' meaning).
    damping: share of the mean of the Hessian's diagonal that is added to it (GPTQ, and the scales of AWQ alone).
    dtype: what the source is cast to first: `auto` keeps the source's own (bfloat16 for float32 and GGUF sources).

    Raises `LlmqError` on any value outside these.
    """

    method: str = DEFAULT_METHOD
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scales: str | None = None
    ignore: tuple[str, ...] = ()
    damping: float = 0.01
    dtype: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", tuple(self.ignore))
        row = method(self.method)
        if self.scales is None:
            object.__setattr__(self, "scales", row.default_scales)
        _member("bits", self.bits, BITS)
        _member("scales", self.scales, SCALES)
        _member("dtype", self.dtype, DTYPES)
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise LlmqError(f"group_size must be an integer; got {self.group_size!r}")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise LlmqError(
                f"group_size must be positive, or {PER_CHANNEL} for one scale per channel; got {self.group_size}"
            )
        if not isinstance(self.symmetric, bool):
            raise LlmqError(f"symmetric must be True or False; got {self.symmetric!r}")
        if not 0 < self.damping < 1:
            raise LlmqError(f"damping must lie strictly between 0 and 1; got {self.damping}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` of it is an equal config."""
        return asdict(self) | {"ignore": list(self.ignore)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The config that `to_dict` wrote. Unknown keys raise `LlmqError`."""
        _refuse_unknown(cls, values)
        return cls(**values)


@dataclass(frozen=True)
class Calibration:
    """Which text a calibrated method sees.

    dataset: `builtin` (text that ships with Python), `wikitext2`, `c4`, the path of a text file, or of a `.jsonl` file
        whose lines hold `messages`, which go through the model's chat template; `self`: the model writes it.
    num_samples: windows used at most (all that the text gives, where it gives fewer).
    seq_len: tokens per window; every window is full.
    seed: which windows are drawn, or written.
    """

    dataset: str = "builtin"
    num_samples: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len"):
            if getattr(self, name) < 1:
                raise LlmqError(f"{name} must be at least 1; got {getattr(self, name)}")


def _member(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise LlmqError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _refuse_unknown(cls: type[QuantConfig], values: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise LlmqError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}")
