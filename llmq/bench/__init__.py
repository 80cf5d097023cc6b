"""Measurements: a model as it was beside itself packed, and what Python costs in between; `kernels`: kernels alone."""
