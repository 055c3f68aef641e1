"""Benchmarks: one file per operator, one end to end. `python -m benchmarks [operator ...]` runs them."""
