"""Estimates before a run starts what it will take on every rank: memory, averaging, traffic."""
