"""Chooses few combinations of settings in which every two values of different settings meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Rows of one value for every factor, such that any two values of two factors share a row.

    Greedy: the next row is the first of those that hold most pairs not met so far. The same factors give the same
    rows.
    """
    rows = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    met = [pairs(row) for row in rows]
    missing = set().union(*met)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(met[index] & missing))
        chosen.append(rows[best])
        missing -= met[best]
    return chosen


def pairs(row: Row) -> set[frozenset[tuple[str, Any]]]:
    """All pairs of settings that a row tries together."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}
