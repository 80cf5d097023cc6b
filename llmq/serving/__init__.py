"""Modules whose weights stay packed, and which kernel runs them."""
