"""What `scripts/bench_model.py` measures: a model as it was beside itself packed, and what Python costs in between."""
