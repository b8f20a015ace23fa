"""Sizes in memory, as people read them."""

from __future__ import annotations


def sized(count: int) -> str:
    """Format a number of bytes: ``1.25 GiB``, ``3.2 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
