"""How memory is read and figures are summarised, the same in every benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

CLEAR = Path("/proc/self/clear_refs")
"""What sets the peak of this process's resident memory back to what is resident now."""


def memory_of(entry: str, process: int | str = "self") -> int:
    """An entry of a process's status in bytes, such as VmRSS (resident now) or VmHWM (its peak).

    Raises:
        KeyError: it has no such entry; once it has ended, none of memory.
    """
    entries = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return 1024 * int(entries[entry].split()[0])


def forget_peak() -> None:
    """Let VmHWM count from here."""
    CLEAR.write_text("5")


def spread(values: Sequence[float]) -> dict[str, object]:
    """Median, quartiles and extremes of repeated measurements, and the measurements themselves."""
    ordered = sorted(values)
    low, _, high = statistics.quantiles(ordered, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": significant(statistics.median(ordered)),
        "quartiles": [significant(low), significant(high)],
        "range": [significant(ordered[0]), significant(ordered[-1])],
        "values": [significant(value) for value in values],
    }


def significant(value: float) -> float:
    """A figure rounded to six digits: more are noise."""
    return float(f"{value:.6g}")
