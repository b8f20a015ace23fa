"""Leaves out of a benchmark, with the reason, what would not fit into its time or on its card.

``SWAFT_BENCH_UNTIL`` is the time (`time.time`) after which nothing new is started. ``SWAFT_BENCH_PARTIAL`` is a
file that gets each result as it is found, one JSON line each, so that finished work survives a kill.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable

import torch


def seconds_left() -> float:
    """Return the seconds until the limit; infinite without one."""
    return float(os.environ.get("SWAFT_BENCH_UNTIL", math.inf)) - time.time()


def within(name: str, needs_s: float, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Return what a measurement finds, or that it was skipped: no time is left, or it does not fit on the card.

    Args:
        name: name of what is measured, for the file of partial results.
        needs_s: least number of seconds that it takes.
        measure: makes the measurement.
    """
    if seconds_left() < needs_s:
        return {"skipped": f"out of time: {seconds_left():.0f} s left, {needs_s:.0f} needed"}
    try:
        found = measure()
    except torch.OutOfMemoryError as error:
        found = {"skipped": f"does not fit on this card: {str(error).partition(chr(10))[0]}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    partial = os.environ.get("SWAFT_BENCH_PARTIAL")
    if partial:
        with open(partial, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "found": found}, default=str) + "\n")
    return found
