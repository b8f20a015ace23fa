"""How figures are summarised, the same in every benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


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
