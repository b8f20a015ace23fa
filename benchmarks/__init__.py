"""Benchmarks, side by side in one run; their results are committed under results/."""
