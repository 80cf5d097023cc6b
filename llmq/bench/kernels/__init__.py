"""Benchmarks of single kernels: compared with float64, timed beside rivals, launches tuned, machine code checked."""
