"""What `scripts/bench_kernels.py` and `scripts/tune_kernels.py` do: kernels held against float64, timed beside rivals, tuned."""
