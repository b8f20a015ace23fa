"""Sizes in memory, as people read them."""

from __future__ import annotations

import math


def sized(count: int) -> str:
    """Format a number of bytes: ``1.25 GiB``, ``3.2 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def parse_size(text: str) -> int:
    """Bytes of a size like `5GB`, `500MB` or `2GiB`, as the hub writes them.

    Raises:
        ValueError: it is not a size.
    """
    units = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3}
    unit = next((unit for unit in units if text.upper().endswith(unit)), "")
    size = float(text[: len(text) - len(unit)]) * units.get(unit, 1)
    if not (math.isfinite(size) and size >= 1):
        raise ValueError(text)
    return int(size)
