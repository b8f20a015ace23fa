"""Paired differences between arms, their intervals, sign tests, and the rate of false alarms. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Pairs = Mapping[str, np.ndarray]
"""From a task to the paired differences of its seeds, (n,)."""

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int
    """Pairs behind it."""

    @property
    def clear(self) -> bool:
        """Whether it excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """One arm against another, on one outcome."""

    by_task: Mapping[str, Interval]
    overall: Interval | None
    """The mean over tasks, with tasks resampled as well as seeds; None for fewer than two tasks."""
    lower: int
    """Pairs in which the arm's value is the lower one."""
    higher: int
    p_value: float
    """From the two-sided sign test over all pairs; ties are left out."""


def compare(pairs: Pairs) -> Comparison:
    """Summarise the paired differences of one outcome.

    Args:
        pairs: for every task with at least two seeds.
    """
    joined = np.concatenate(list(pairs.values()))
    lower, higher = int((joined < 0).sum()), int((joined > 0).sum())
    return Comparison(
        by_task={task: over_seeds(values) for task, values in pairs.items()},
        overall=over_tasks(pairs) if len(pairs) > 1 else None,
        lower=lower,
        higher=higher,
        p_value=sign_test(lower, higher),
    )


def over_seeds(values: np.ndarray) -> Interval:
    """Mean of one task's differences, with seeds resampled."""
    drawn = values[_generator().integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return _interval(float(values.mean()), drawn, len(values))


def over_tasks(pairs: Pairs) -> Interval:
    """Mean over tasks of their mean differences; tasks are resampled, and the seeds within each."""
    tasks, generator = list(pairs.values()), _generator()
    slots = generator.integers(len(tasks), size=(RESAMPLES, len(tasks)))
    means = np.zeros(slots.shape)
    for i, values in enumerate(tasks):
        places = np.nonzero(slots == i)
        drawn = values[generator.integers(len(values), size=(len(places[0]), len(values)))]
        means[places] = drawn.mean(1)
    centre = float(np.mean([values.mean() for values in tasks]))
    return _interval(centre, means.mean(1), sum(map(len, tasks)))


def sign_test(lower: int, higher: int) -> float:
    """Two-sided p-value of so uneven a split, or a more uneven one, if both signs were equally likely."""
    n, k = lower + higher, min(lower, higher)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, step by step (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


def false_alarms(values: Pairs, *, splits: int = 100) -> float | None:
    """How often an arm differs from itself: the share of random splits of its seeds into two halves in which the
    interval over tasks excludes 0. It should be 5 %.

    Args:
        values: of one arm, by task, one per seed.
        splits: number of random splits.

    Returns:
        The share; None for fewer than two tasks with four seeds.
    """
    usable = [task for task, of_seeds in values.items() if len(of_seeds) >= 4]
    if len(usable) < 2:
        return None
    generator, alarms = _generator(), 0
    for _ in range(splits):
        pairs = {}
        for task in usable:
            order = generator.permutation(values[task])
            half = len(order) // 2
            pairs[task] = order[:half] - order[half : 2 * half]
        alarms += over_tasks(pairs).clear
    return alarms / splits


def _interval(mean: float, drawn: np.ndarray, count: int) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), count)


def _generator() -> np.random.Generator:
    return np.random.default_rng(20260101)
