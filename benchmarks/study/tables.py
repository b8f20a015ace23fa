"""Tables of arms against their baselines, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from benchmarks.study.arms import BASELINES, OUTCOMES, Kept, cost_of
from benchmarks.study.statistics import Comparison, Interval, holm
from benchmarks.study.tasks import TASKS


def table(
    kept: Kept, regime: str, arms: Sequence[str], *, tasks: Collection[str], p_values: bool = False
) -> str | None:
    """Arms against their baselines over some tasks, one row per arm; None if there is nothing to show."""
    found = []
    for arm in arms:
        comparisons = {outcome: kept.from_baseline(regime, arm, outcome, tasks=tasks) for outcome in OUTCOMES}
        if comparisons["loss"]:
            found.append((arm, BASELINES[cost_of(arm)], comparisons))
    if not found:
        return None
    head = ["arm", "against", *OUTCOMES.values(), "tasks, pairs"]
    adjusted = holm([comparisons["loss"].p_value for _, _, comparisons in found])
    if p_values:
        head += ["tasks with lower : higher loss", "p, Holm"]
    lines = [line(head), line(["---"] * len(head))]
    for (arm, base, comparisons), p_value in zip(found, adjusted, strict=True):
        loss = comparisons["loss"]
        cells = [f"`{arm}`", f"`{base}`", *(told_overall(comparisons[outcome]) for outcome in OUTCOMES)]
        cells.append(f"{len(loss.by_task)}, {loss.count}")
        if p_values:
            cells += [f"{loss.lower} : {loss.higher}", f"{p_value:.2g}"]
        lines.append(line(cells))
    return "\n".join(lines)


def absolute(kept: Kept, regime: str) -> list[str]:
    """Task by task: test loss (nats) and score (points), mean and standard deviation over seeds."""
    tasks, parts = _tasks(kept, regime), []
    for outcome, title, digits in (("nll", "test loss, nats", 4), ("score", "score, points", 2)):
        lines = [line([title, *tasks]), line(["---"] * (len(tasks) + 1))]
        for arm in kept.arms(regime):
            values = kept.values(regime, arm, outcome)
            cells = [
                _spread([value for (t, _), value in values.items() if t == task], digits) for task in tasks
            ]
            lines.append(line([f"`{arm}`", *cells]))
        parts.append("\n".join(lines))
    return parts if tasks else []


def by_task(kept: Kept, regime: str) -> list[str]:
    """Task by task: differences in test loss and in the score."""
    tasks, parts = _tasks(kept, regime), []
    for outcome in ("loss", "score"):
        lines = [line([f"{OUTCOMES[outcome]}", *tasks]), line(["---"] * (len(tasks) + 1))]
        for arm in kept.arms(regime):
            comparison = kept.from_baseline(regime, arm, outcome)
            if comparison:
                intervals = [comparison.by_task.get(task) for task in tasks]
                lines.append(line([f"`{arm}`", *(told(found) if found else "" for found in intervals)]))
        if len(lines) > 2:
            parts.append("\n".join(lines))
    return parts


def _tasks(kept: Kept, regime: str) -> list[str]:
    return [
        task for task in TASKS if any(row["task"] == task and row["regime"] == regime for row in kept.rows)
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; for one value, just the value."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def told_overall(comparison: Comparison | None) -> str:
    """The mean over tasks and its interval; of too few tasks, each one's mean."""
    if comparison is None:
        return ""
    if comparison.overall is None:
        return ", ".join(f"{found.mean:+.2f} ({task})" for task, found in comparison.by_task.items())
    return told(comparison.overall)


def told(found: Interval) -> str:
    """A mean and its interval, bold if the interval excludes 0."""
    text = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    return f"**{text}**" if found.clear else text


def line(cells: Sequence[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"
