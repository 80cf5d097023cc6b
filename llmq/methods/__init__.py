"""Roundings: each file holds one algorithm, a pure function of a weight and its statistics (`llmq.methods.base`).

`llmq.config.METHODS` names them by import path.
"""
