"""Roundings: each file is one algorithm, a pure function of a weight and its statistics (`llmq.methods.base`).

`ROUNDINGS` maps the names of `llmq.config.METHODS` to them.
"""

from llmq.methods.base import Rounding
from llmq.methods.gptq import gptq
from llmq.methods.rtn import rtn

ROUNDINGS: tuple[tuple[str, Rounding], ...] = (("rtn", rtn), ("gptq", gptq))


def rounding(name: str) -> Rounding:
    """The rounding called `name`; the names are those of `llmq.config.METHODS`."""
    return dict(ROUNDINGS)[name]
