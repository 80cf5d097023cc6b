"""Transforms: each file holds one way to change a block before rounding without changing its function (`llmq.transforms.base`).

`llmq.config.METHODS` names them by import path.
"""
