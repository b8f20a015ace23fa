"""What a run will take on every rank, told before it starts: memory, averaging, traffic."""

from __future__ import annotations


def sized(count: int) -> str:
    """Write a number of bytes as people do: ``1.25 GiB``, ``3.2 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
