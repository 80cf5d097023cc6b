"""Quantizing a model block by block: the plan, the work on one block, the loop over all, what it will cost."""
