"""Modules whose weights stay packed, and the choice of the kernel that runs them."""
