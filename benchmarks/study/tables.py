"""Tables of arms against their baselines, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence

from benchmarks.study.arms import BASELINES, OUTCOMES, Kept, cost_of
from benchmarks.study.fitting import REGIMES
from benchmarks.study.grid import RATES, chosen_rate, tried
from benchmarks.study.statistics import Comparison, Interval, holm
from benchmarks.study.store import Row
from benchmarks.study.tasks import TASKS
from benchmarks.study.trainings import TRAININGS


def table(kept: Kept, regime: str, tasks: Collection[str], *, within: Sequence[Collection[str]] = ()) -> str:
    """Arms against their baselines over some tasks, one row per arm; empty if there is nothing to show.

    Args:
        kept: the rows.
        regime: of the arms.
        tasks: those to compare on.
        within: groups of them; only arms that are measured on some tasks of each are shown.
    """
    found = []
    for arm in kept.arms(regime):
        comparisons = {outcome: kept.from_baseline(regime, arm, outcome, tasks=tasks) for outcome in OUTCOMES}
        loss = comparisons["loss"]
        if loss and all(loss.by_task.keys() & set(group) for group in within):
            found.append((arm, BASELINES[cost_of(arm)], comparisons))
    counts = ["tasks, pairs", "tasks with lower : higher loss", "p, Holm"]
    head = ["arm", "against", *OUTCOMES.values(), *counts]
    adjusted = holm([comparisons["loss"].p_value for _, _, comparisons in found])
    lines = []
    for (arm, base, comparisons), p_value in zip(found, adjusted, strict=True):
        loss = comparisons["loss"]
        cells = [f"`{arm}`", f"`{base}`", *(told_overall(comparisons[outcome]) for outcome in OUTCOMES)]
        cells += [f"{len(loss.by_task)}, {loss.count}", f"{loss.lower} : {loss.higher}", f"{p_value:.2g}"]
        lines.append(cells)
    return markdown(head, lines)


def summary(kept: Kept, arms: Sequence[str], groups: Mapping[str, Collection[str]]) -> str:
    """Loss and score of arms against their baselines, over groups of tasks; empty if there is nothing to show.

    An arm has a mean over a group if it is measured on all of its tasks.
    """
    head = [f"{OUTCOMES[outcome]}: {group}" for outcome in ("loss", "score") for group in groups]
    lines = []
    for arm in arms:
        found = {
            (outcome, group): kept.from_baseline("main", arm, outcome, tasks=tasks)
            for outcome in ("loss", "score")
            for group, tasks in groups.items()
        }
        whole = {at: each for at, each in found.items() if each and each.by_task.keys() >= set(groups[at[1]])}
        if whole:
            cells = [told_overall(whole.get(at)) for at in found]
            count = max(each.count for each in whole.values())
            lines.append([f"`{arm}`", f"`{BASELINES[cost_of(arm)]}`", *cells, str(count)])
    return markdown(["arm", "against", *head, "pairs"], lines)


def by_task_and_mean(
    kept: Kept, regime: str, arms: Sequence[str], base: str, outcome: str, tasks: Sequence[str]
) -> str:
    """Arms against one baseline, task by task and over all; empty if there is nothing to show.

    An arm has a mean if it is measured on every task that any of them is measured on.
    """
    found = {arm: kept.comparison(regime, arm, base, outcome, tasks=tasks) for arm in arms}
    measured = {arm: each for arm, each in found.items() if each}
    shown = [task for task in tasks if any(task in each.by_task for each in measured.values())]
    lines = []
    for arm, each in measured.items():
        cells = [told(each.by_task[task]) if task in each.by_task else "" for task in shown]
        whole = told(each.overall) if each.overall and each.by_task.keys() == {*shown} else ""
        lines.append([f"`{arm}`", *cells, whole])
    return markdown([OUTCOMES[outcome], *shown, "mean"], lines)


def absolute(kept: Kept, regime: str) -> list[str]:
    """Task by task: test loss (nats) and score (points), mean and standard deviation over seeds."""
    tasks, parts = _tasks(kept, regime), []
    for outcome, title, digits in (("nll", "test loss, nats", 4), ("score", "score, points", 2)):
        lines = []
        for arm in kept.arms(regime):
            values = kept.values(regime, arm, outcome)
            cells = [
                _spread([value for (t, _), value in values.items() if t == task], digits) for task in tasks
            ]
            lines.append([f"`{arm}`", *cells])
        parts.append(markdown([title, *tasks], lines))
    return [part for part in parts if part]


def by_task(kept: Kept, regime: str) -> list[str]:
    """Task by task: differences in test loss and in the score."""
    tasks, parts = _tasks(kept, regime), []
    for outcome in ("loss", "score"):
        lines = []
        for arm in kept.arms(regime):
            comparison = kept.from_baseline(regime, arm, outcome)
            if comparison:
                intervals = [comparison.by_task.get(task) for task in tasks]
                lines.append([f"`{arm}`", *(told(found) if found else "" for found in intervals)])
        parts.append(markdown([OUTCOMES[outcome], *tasks], lines))
    return [part for part in parts if part]


def rates(rows: Sequence[Row]) -> list[str]:
    """The chosen learning rates, one table per regime."""
    parts = []
    for regime in REGIMES:
        chosen = {
            training: [chosen_rate(training, regime, task, rows) for task in TASKS] for training in TRAININGS
        }
        lines = [
            [f"`{training}`", *(f"{rate:g}{_edge(rate)}" if rate else "" for rate in of)]
            for training, of in chosen.items()
            if any(of)
        ]
        if lines:
            parts += [f"{REGIMES[regime].title}:", markdown(["training", *TASKS], lines)]
    return parts


def rates_tried(rows: Sequence[Row]) -> list[str]:
    """Every learning rate tried, one table per task, the chosen one in bold."""
    parts = []
    for regime in REGIMES:
        for task in TASKS:
            lines = []
            for training in TRAININGS:
                losses = tried(training, regime, task, rows)
                chosen = chosen_rate(training, regime, task, rows)
                told = {rate: f"{loss:.4f}" for rate, loss in losses.items()}
                if chosen is not None:
                    told[chosen] = f"**{told[chosen]}**{_edge(chosen)}"
                if told:
                    lines.append([f"`{training}`", *(told.get(rate, "") for rate in RATES)])
            if lines:
                head = ["training", *(f"{rate:g}" for rate in RATES)]
                parts += [f"### {task}, {REGIMES[regime].title}", markdown(head, lines)]
    return parts


def _edge(rate: float) -> str:
    return " (edge)" if rate in (RATES[0], RATES[-1]) else ""


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


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells below its head; empty without lines."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) if lines else ""
