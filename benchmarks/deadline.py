"""A time limit for a benchmark: what would not fit is recorded as skipped, what is done survives a kill.

``SWAFT_BENCH_UNTIL`` is the time (`time.time`) after which nothing new is begun. ``SWAFT_BENCH_PARTIAL`` is a file
that gets each result as it is found, one JSON line each.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable


def seconds_left() -> float:
    """Return the seconds until the limit; infinite without one."""
    return float(os.environ.get("SWAFT_BENCH_UNTIL", math.inf)) - time.time()


def within(name: str, needs_s: float, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Return what a measurement finds, or that it was skipped.

    Args:
        name: of what is measured, for the file of partial results.
        needs_s: seconds that it takes at least.
        measure: makes the measurement.
    """
    if seconds_left() < needs_s:
        return {"skipped": f"out of time: {seconds_left():.0f} s left, {needs_s:.0f} needed"}
    found = measure()
    partial = os.environ.get("SWAFT_BENCH_PARTIAL")
    if partial:
        with open(partial, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "found": found}, default=str) + "\n")
    return found
