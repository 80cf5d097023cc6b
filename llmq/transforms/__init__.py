"""Transforms: each file is one way to change a block before it is rounded, its function preserved (`llmq.transforms.base`).

`TRANSFORMS` maps the names of `llmq.config.METHODS`' transforms to them.
"""

from llmq.transforms.awq import awq
from llmq.transforms.base import Transform

TRANSFORMS: tuple[tuple[str, Transform], ...] = (("awq", awq),)


def transform(name: str) -> Transform:
    """The transform called `name`."""
    return dict(TRANSFORMS)[name]
