"""Paired differences between arms, their intervals, sign tests, and the rate of false alarms. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

Pairs = Mapping[str, np.ndarray]
"""From a task to the paired differences of its seeds, (n,)."""

FEWEST_TASKS = 4
"""For a mean over tasks with an interval; with fewer, the interval says next to nothing."""
MOST_TASKS = 1000
"""More of them are not counted."""
RESAMPLES = 4000
SPLITS = 100
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its interval: from the lower to the upper end of the bootstrap's interval and Student's t.

    A bootstrap over three or four values is far too narrow; t allows for how few there are.
    """

    mean: float
    low: float
    high: float
    count: int
    """Pairs behind it."""

    @property
    def clear(self) -> bool:
        """Whether it excludes 0."""
        return self.low > 0 or self.high < 0

    def rescaled(self, scale: Callable[[float], float]) -> Interval:
        """The same on another scale, which must increase."""
        return Interval(scale(self.mean), scale(self.low), scale(self.high), self.count)


@dataclass(frozen=True)
class Comparison:
    """One arm against another, on one outcome."""

    by_task: Mapping[str, Interval]
    overall: Interval | None
    """The mean over tasks, with tasks resampled as well as seeds; None for fewer than `FEWEST_TASKS`."""
    lower: int
    """Tasks in which the arm's mean is the lower one."""
    higher: int
    p_value: float
    """From the two-sided sign test over tasks; ties are left out. Seeds of one task are no independent cases."""

    @property
    def count(self) -> int:
        """Pairs behind it."""
        return sum(found.count for found in self.by_task.values())

    def rescaled(self, scale: Callable[[float], float]) -> Comparison:
        """The same on another scale, which must increase and keep 0."""
        by_task = {task: found.rescaled(scale) for task, found in self.by_task.items()}
        return replace(self, by_task=by_task, overall=self.overall and self.overall.rescaled(scale))


def compare(pairs: Pairs) -> Comparison:
    """Summarise the paired differences of one outcome.

    Args:
        pairs: for every task with at least two seeds.
    """
    means = np.array([values.mean() for values in pairs.values()])
    lower, higher = int((means < 0).sum()), int((means > 0).sum())
    return Comparison(
        by_task={task: over_seeds(values) for task, values in pairs.items()},
        overall=over_tasks(pairs) if len(pairs) >= FEWEST_TASKS else None,
        lower=lower,
        higher=higher,
        p_value=float(stats.binomtest(lower, lower + higher).pvalue) if lower + higher else 1.0,
    )


def over_seeds(values: np.ndarray) -> Interval:
    """Mean of one task's differences, with seeds resampled."""
    drawn = values[_generator().integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return _interval(values, drawn, len(values))


def over_tasks(pairs: Pairs) -> Interval:
    """Mean over tasks of their mean differences; tasks are resampled, and the seeds within each."""
    tasks, generator = list(pairs.values()), _generator()
    slots = generator.integers(len(tasks), size=(RESAMPLES, len(tasks)))
    means = np.zeros(slots.shape)
    for i, values in enumerate(tasks):
        places = np.nonzero(slots == i)
        drawn = values[generator.integers(len(values), size=(len(places[0]), len(values)))]
        means[places] = drawn.mean(1)
    return _interval(np.array([values.mean() for values in tasks]), means.mean(1), sum(map(len, tasks)))


def can_be_below(known: Sequence[float], count: int) -> bool:
    """Whether there are values for the missing tasks that put the interval over all of them below 0.

    Student's t excludes 0 if the squared sum of n means exceeds c times the sum of their squares. Each missing one
    raises the ratio of the two by at most 1 (Cauchy's inequality).

    Args:
        known: means of the tasks that have been measured.
        count: n, of all tasks.
    """
    quantile = _quantile(count)
    needed = quantile**2 * count / (count - 1 + quantile**2)
    total, squares = sum(known), sum(value**2 for value in known)
    return count - len(known) + (total**2 / squares if total < 0 else 0) > needed


def tasks_needed(found: Comparison) -> int | None:
    """The fewest tasks, more than those measured and as different, with which Student's t interval would lie above
    0; None if `MOST_TASKS` do not suffice.
    """
    means = np.array([each.mean for each in found.by_task.values()])
    mean, spread = means.mean(), means.std(ddof=1)
    for count in range(len(means) + 1, MOST_TASKS + 1):
        if _quantile(count) * spread < math.sqrt(count) * mean:
            return count
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, step by step (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


def false_alarms(values: Pairs) -> float | None:
    """How often an arm differs from itself: the share of random splits of its seeds into two halves in which the
    interval over tasks excludes 0. It should be at most 5 %.

    Args:
        values: of one arm, by task, one per seed.

    Returns:
        The share; None for fewer than two tasks with four seeds.
    """
    usable = [task for task, of_seeds in values.items() if len(of_seeds) >= 4]
    if len(usable) < 2:
        return None
    generator, alarms = _generator(), 0
    for _ in range(SPLITS):
        pairs = {}
        for task in usable:
            order = generator.permutation(values[task])
            half = len(order) // 2
            pairs[task] = order[:half] - order[half : 2 * half]
        alarms += over_tasks(pairs).clear
    return alarms / SPLITS


def _interval(values: np.ndarray, drawn: np.ndarray, count: int) -> Interval:
    """The interval of a mean of values, given the means of their resamples."""
    mean, low, high = values.mean(), *np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    half = _quantile(len(values)) * stats.sem(values)
    return Interval(float(mean), float(min(low, mean - half)), float(max(high, mean + half)), count)


def _quantile(count: int) -> float:
    """Student's t at this level, for the mean of so many values."""
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


def _generator() -> np.random.Generator:
    return np.random.default_rng(20260101)
