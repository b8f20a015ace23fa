"""What the rules of grid.py come to: the averaging rule and the objective that are recommended."""

from __future__ import annotations

import re

from benchmarks.study.arms import BASELINES, Kept, cost_of
from benchmarks.study.grid import CHOOSING, CONFIRMING
from benchmarks.study.statistics import Comparison
from benchmarks.study.tasks import TASKS

KINDS = {1: "averaging", 2: "objective"}
QUOTE = re.compile(r"`([\w.-]+:[\w.+-]+)`: [^`]*? points of score")
"""An arm with its differences, as other pages quote them."""


def choose_default(kept: Kept) -> list[str]:
    """A paragraph for averaging and one for objectives: what is chosen, by how much, and what confirms it."""
    return [_tell(kept, units, kind) for units, kind in KINDS.items()]


def best_arm(kept: Kept, units: int) -> str | None:
    """The arm that the rule chooses on the choosing tasks.

    Returns:
        None where no arm is ahead with its interval clear of 0, or some choosing task has no pairs yet.
    """
    ahead = []
    for arm in kept.arms("main"):
        if cost_of(arm) != units or arm == BASELINES[units]:
            continue
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


def _tell(kept: Kept, units: int, kind: str) -> str:
    base = BASELINES[units]
    compared = [
        kept.comparison("main", arm, base, "loss", tasks=CHOOSING)
        for arm in kept.arms("main")
        if cost_of(arm) == units and arm != base
    ]
    if not any(map(_covers, compared)):
        return (
            f"**Recommended {kind}: open.** The choosing tasks have not all been measured on three seeds yet."
        )
    arm = best_arm(kept, units)
    if arm is None:
        return (
            f"**Recommended {kind}: none.** No arm is ahead of `{base}` on test loss with its interval clear of 0, "
            "and no worse on the score, over the choosing tasks."
        )
    chosen = differences(kept, arm, base, CHOOSING)
    told = f"**Recommended {kind}: `{arm}`** against `{base}`. On the choosing tasks: {chosen}."
    confirmed = kept.comparison("main", arm, base, "loss", tasks=CONFIRMING)
    if not _covers(confirmed, CONFIRMING):
        return f"{told} The confirming tasks have not all been measured yet."
    return f"{told} On the confirming tasks: {differences(kept, arm, base, CONFIRMING)}."


def quote(text: str, kept: Kept) -> str:
    """A text in which what it quotes of arms, over all tasks, is as the rows say now."""

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
