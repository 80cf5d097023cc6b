"""Benchmarks of whole models (speed, host time) after correctness checks; `kernels` has those of single kernels."""
