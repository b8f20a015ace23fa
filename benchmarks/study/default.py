"""What the rules in grid.py lead to: the recommended averaging rule and objective."""

from __future__ import annotations

import re

from benchmarks.study.arms import BASELINES, Kept, cost_of
from benchmarks.study.grid import CHOOSING, CONFIRMING, MAIN
from benchmarks.study.statistics import Comparison
from benchmarks.study.tasks import TASKS
from benchmarks.study.trainings import TRAININGS

KINDS = {1: "averaging", 2: "objective"}
QUOTE = re.compile(r"`([\w.-]+:[\w.+-]+)`: [^`]*? points of score")
"""An arm with its differences, as other pages quote them."""


def choose_default(kept: Kept) -> list[str]:
    """A paragraph each for averaging and objectives: what is chosen, by what margin, and what confirms it."""
    return [_tell(kept, units, kind) for units, kind in KINDS.items()]


def best_arm(kept: Kept, units: int) -> str | None:
    """The arm that the criterion selects on the choosing tasks.

    Returns:
        None if no arm is ahead with an interval that excludes 0, or a main training is not measured on all of them.
    """
    if not_measured(kept, units):
        return None
    ahead = []
    for arm in _candidates(kept, units):
        loss, score = (
            kept.comparison("main", arm, BASELINES[units], outcome, tasks=CHOOSING)
            for outcome in ("loss", "score")
        )
        if (
            not _covers(loss)
            or loss is None
            or score is None
            or loss.overall is None
            or score.overall is None
        ):
            continue
        if loss.overall.high < 0 and score.overall.mean >= 0:
            ahead.append((loss.overall.mean, arm))
    return min(ahead)[1] if ahead else None


def not_measured(kept: Kept, units: int) -> list[str]:
    """The main trainings to choose among that have not been measured on every choosing task."""
    base = BASELINES[units]
    measured = {
        arm.partition(":")[0]
        for arm in _candidates(kept, units)
        if _covers(kept.comparison("main", arm, base, "loss", tasks=CHOOSING))
    }
    own = base.partition(":")[0]
    return [name for name in MAIN if _chosen_among(name, units) and name not in measured | {own}]


def _candidates(kept: Kept, units: int) -> list[str]:
    return [
        arm
        for arm in kept.arms("main")
        if _chosen_among(arm.partition(":")[0], units) and arm != BASELINES[units]
    ]


def _chosen_among(training: str, units: int) -> bool:
    """Whether its cost comes from its passes alone, not from more epochs or teachers."""
    return TRAININGS[training].passes == TRAININGS[training].units == units


def _tell(kept: Kept, units: int, kind: str) -> str:
    base, missing = BASELINES[units], not_measured(kept, units)
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        return f"**Recommended {kind}: open.** Not measured yet on all choosing tasks, three seeds each: {names}."
    arm = best_arm(kept, units)
    if arm is None:
        return (
            f"**Recommended {kind}: none.** Over the choosing tasks, no arm that is no worse than `{base}` on the "
            "score beats it on test loss with an interval that excludes 0."
        )
    chosen = differences(kept, arm, base, CHOOSING)
    told = f"**Recommended {kind}: `{arm}`** against `{base}`. On the choosing tasks: {chosen}."
    confirmed = kept.comparison("main", arm, base, "loss", tasks=CONFIRMING)
    if not _covers(confirmed, CONFIRMING):
        return f"{told} The confirming tasks have not all been measured yet."
    return f"{told} On the confirming tasks: {differences(kept, arm, base, CONFIRMING)}."


def quote(text: str, kept: Kept) -> str:
    """The text with its quoted differences, over all tasks, updated to the current rows."""

    def told(match: re.Match[str]) -> str:
        arm = match[1]
        return f"`{arm}`: {differences(kept, arm, BASELINES[cost_of(arm)], tuple(TASKS))}"

    return QUOTE.sub(told, text)


def differences(kept: Kept, arm: str, base: str, tasks: tuple[str, ...]) -> str:
    """An arm minus another in test loss and score, with 95 % intervals over these tasks."""
    parts = []
    for outcome, unit in (("loss", "% of test loss"), ("score", "points of score")):
        comparison = kept.comparison("main", arm, base, outcome, tasks=tasks)
        if comparison is not None and comparison.overall is not None:
            found = comparison.overall
            parts.append(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}] {unit}")
    return ", ".join(parts)


def _covers(comparison: Comparison | None, tasks: tuple[str, ...] = CHOOSING) -> bool:
    return comparison is not None and comparison.by_task.keys() >= set(tasks)
