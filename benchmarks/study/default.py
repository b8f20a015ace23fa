"""What the rules in grid.py lead to: the recommended averaging rule and objective."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterator, Sequence

from benchmarks.study.arms import BASELINES, EPOCHS_CHOSEN, Kept, cost_of
from benchmarks.study.grid import CHOOSING, CONFIRMING, DECIDING_SEEDS, GENERAL, MAIN
from benchmarks.study.statistics import MOST_TASKS, Comparison, can_be_below, tasks_needed
from benchmarks.study.trainings import TRAININGS

KINDS = {1: "averaging", 2: "objective"}
PLAIN = {"decayed": "decayed2x", "constant": "constant2x"}
"""By schedule, the training with the plain loss that costs as much as one with a two-pass objective."""
ALL = CHOOSING + CONFIRMING
ON = {"": CHOOSING, " on the confirming tasks": CONFIRMING, " on all eight tasks": ALL} | {
    f" on {task}": (task,) for task in (*ALL, *GENERAL)
}
"""The tasks a quote is about, by the words that follow the arm."""
IN = {"": "main", " with 500 rows": "small", " in longer runs": "long", " with epochs chosen": EPOCHS_CHOSEN}
"""Its regime, by the words that follow those."""
QUOTE = re.compile(rf"`([\w.-]+:[\w.+-]+)`({'|'.join(ON)})({'|'.join(IN)}): [^`]*? points of score")
"""An arm with its differences, as other pages quote them."""


def choose_default(kept: Kept) -> list[str]:
    """A paragraph each for averaging and objectives: what is chosen, by what margin, and what confirms it."""
    return [_tell(kept, units, kind) for units, kind in KINDS.items()]


def best_arm(kept: Kept, units: int) -> str | None:
    """The arm that the criterion selects on the choosing tasks.

    Returns:
        None if no arm is ahead with an interval that excludes 0, or something it depends on is not measured yet.
    """
    if not_measured(kept, units):
        return None
    ahead = [
        (loss.overall.mean, arm)
        for arm, loss, _ in _ahead(kept, units)
        if loss.overall is not None and all(_mean(found) < 0 for found in _against_plain(kept, arm))
    ]
    return min(ahead)[1] if ahead else None


def not_measured(kept: Kept, units: int) -> list[str]:
    """The trainings that the choice depends on and that are not measured on every choosing task."""
    missing = [name for name, hopeful in _unfinished(kept, units).items() if hopeful]
    return missing or sorted(
        {
            PLAIN[TRAININGS[arm.partition(":")[0]].schedule]
            for arm, _, _ in _ahead(kept, units)
            if not all(map(covers, _against_plain(kept, arm)))
        }
    )


def _unfinished(kept: Kept, units: int) -> dict[str, bool]:
    """The trainings to choose among that are not measured on every choosing task, and whether one of their readouts
    can still be ahead, whatever the other tasks give.
    """
    own = BASELINES[units].partition(":")[0]
    losses: dict[str, list[Comparison]] = {name: [] for name in MAIN if _chosen_among(name, units)}
    for arm, loss, _ in _measured(kept, units):
        losses[arm.partition(":")[0]].append(loss)
    return {
        name: not found or any(map(_can_be_ahead, found))
        for name, found in losses.items()
        if name != own and not any(map(covers, found))
    }


def _can_be_ahead(loss: Comparison) -> bool:
    known = [math.log1p(found.mean / 100) for found in loss.by_task.values()]
    return can_be_below(known, len(CHOOSING))


def cross_validated(kept: Kept, units: int) -> float | None:
    """The difference in loss, in per cent, of the arm chosen on all choosing tasks but one, on that one; mean over
    which one is left out. Unlike the difference of the arm that is chosen, it is not flattered by the choice.
    """
    found = []
    for task in CHOOSING:
        others = [name for name in CHOOSING if name != task]
        means = {
            arm: tuple(
                statistics.mean(each.mean for each in found.by_task.values()) for found in (loss, score)
            )
            for arm, loss, score in _measured(kept, units, others)
            if covers(loss, others)
        }
        able = [arm for arm, (_, score) in means.items() if score >= 0]
        if not able:
            return None
        arm = min(able, key=lambda arm: means[arm][0])
        loss = kept.from_baseline("main", arm, "loss", tasks=[task], seeds=DECIDING_SEEDS)
        if loss is None:
            return None
        found.append(loss.by_task[task].mean)
    return statistics.mean(found)


def _measured(
    kept: Kept, units: int, tasks: Sequence[str] = CHOOSING
) -> Iterator[tuple[str, Comparison, Comparison]]:
    """The arms to choose among, with their differences in loss and score on those of the tasks that have them."""
    for arm in kept.arms("main"):
        training, _, readout = arm.partition(":")
        if arm == BASELINES[units] or readout == "chosen" or not _chosen_among(training, units):
            continue
        loss, score = (
            kept.from_baseline("main", arm, outcome, tasks=tasks, seeds=DECIDING_SEEDS)
            for outcome in ("loss", "score")
        )
        if loss is not None and score is not None:
            yield arm, loss, score


def _ahead(kept: Kept, units: int) -> list[tuple[str, Comparison, Comparison]]:
    """The arms that beat the baseline on loss beyond doubt, and are no worse on the score."""
    return [
        (arm, loss, score)
        for arm, loss, score in _measured(kept, units)
        if covers(loss) and loss.overall is not None and loss.overall.high < 0 and _mean(score) >= 0
    ]


def _against_plain(kept: Kept, arm: str) -> list[Comparison | None]:
    """A two-pass arm against the same readout of the plain loss: what the objective gains beyond its readout."""
    if cost_of(arm) == 1:
        return []
    training, _, readout = arm.partition(":")
    plain = f"{PLAIN[TRAININGS[training].schedule]}:{readout}"
    return [kept.comparison("main", arm, plain, "loss", tasks=CHOOSING, seeds=DECIDING_SEEDS)]


def _chosen_among(training: str, units: int) -> bool:
    """Whether it is a main training whose cost comes from its passes alone, not from more epochs."""
    return training in MAIN and TRAININGS[training].passes == TRAININGS[training].units == units


def _mean(found: Comparison | None) -> float:
    return math.nan if found is None or found.overall is None else found.overall.mean


def _tell(kept: Kept, units: int, kind: str) -> str:
    base, missing = BASELINES[units], not_measured(kept, units)
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        return f"**Recommended {kind}: open.** Not measured yet on all choosing tasks, three seeds each: {names}."
    arm = best_arm(kept, units)
    if arm is None and (ahead := _ahead(kept, units)):
        names = ", ".join(f"`{each}`" for each, _, _ in ahead)
        return (
            f"**Recommended {kind}: none.** Over the choosing tasks {names} beat `{base}` on test loss, but not "
            "the same readout of the plain loss trained twice as long, which costs the same: what they gain is the "
            "averaging's."
        )
    if arm is None:
        told = (
            f"**Recommended {kind}: none.** Over the choosing tasks, no arm that is no worse than `{base}` on the "
            f"score beats it on test loss with an interval that excludes 0. `{base}` costs the same: use that."
        )
        if lost := _unfinished(kept, units):
            names = ", ".join(f"`{name}`" for name in lost)
            told += f" Not measured on all of them, because no result on the rest could change that: {names}."
        return told + _best_score(kept, units)
    told = (
        f"**Recommended {kind}: `{arm}`** against `{base}`. Chosen on seeds {DECIDING_SEEDS[0]} to "
        f"{DECIDING_SEEDS[-1]} of the choosing tasks: {differences(kept, arm, CHOOSING, seeds=DECIDING_SEEDS)}."
    )
    if (fair := cross_validated(kept, units)) is not None:
        told += (
            " The choice flatters the chosen arm: one chosen by the same rule on three of the tasks changes the "
            f"loss of the fourth by {fair:+.2f} %, on average."
        )
    told += f" With all seeds, on the choosing tasks: {differences(kept, arm, CHOOSING)}"
    if not covers(kept.from_baseline("main", arm, "loss", tasks=CONFIRMING), CONFIRMING):
        return f"{told}. The confirming tasks have not all been measured yet."
    told += f"; on the confirming tasks: {differences(kept, arm, CONFIRMING)}"
    return f"{told}; on all eight: {differences(kept, arm, ALL)}. {_what_it_takes(kept, arm, ALL)}"


def _best_score(kept: Kept, units: int) -> str:
    """The objective with the highest score, and what it would take to be ahead; empty if there is none."""
    scores = {
        arm: score.overall.mean
        for arm, _, score in _measured(kept, units)
        if units > 1 and covers(score) and score.overall is not None
    }
    if not scores:
        return ""
    arm = max(scores, key=lambda arm: scores[arm])
    return (
        f" Of the readouts measured on all of them, `{arm}` has the highest score: "
        f"{differences(kept, arm, CHOOSING)}. {_what_it_takes(kept, arm, CHOOSING)}"
    )


def _what_it_takes(kept: Kept, arm: str, tasks: Sequence[str]) -> str:
    """What it would take for the interval of the score to exclude 0."""
    score = kept.from_baseline("main", arm, "score", tasks=tasks)
    assert score is not None
    assert score.overall is not None
    if score.overall.low > 0:
        return "The interval of its score excludes 0."
    if score.overall.mean <= 0:
        return "More tasks like these would not put its score ahead: the mean is not above 0."
    if (needed := tasks_needed(score)) is None:
        return f"Not even {MOST_TASKS:,} tasks like these would put its score ahead: the mean is too small."
    return f"With tasks as different as these, the interval of its score excludes 0 from about {needed} tasks on."


def quote(text: str, kept: Kept) -> str:
    """The text with the differences it quotes brought up to date, on the tasks and in the regime that it names."""

    def told(match: re.Match[str]) -> str:
        arm, on, regime = match.groups()
        return f"`{arm}`{on}{regime}: {differences(kept, arm, ON[on], regime=IN[regime])}"

    return QUOTE.sub(told, text)


def differences(
    kept: Kept, arm: str, tasks: Sequence[str], *, seeds: Collection[int] | None = None, regime: str = "main"
) -> str:
    """An arm minus its baseline in test loss and score, with 95 % intervals over these tasks (for one, over seeds).

    Args:
        kept: the rows.
        arm: training and readout.
        tasks: those to compare on.
        seeds: those to compare on; None for all.
        regime: of the arm and its baseline.

    Raises:
        ValueError: too few of the tasks have been measured.
    """
    parts = []
    for outcome, unit in (("loss", "% of test loss"), ("score", "points of score")):
        comparison = kept.from_baseline(regime, arm, outcome, tasks=tasks, seeds=seeds)
        found = comparison and (comparison.overall if len(tasks) > 1 else comparison.by_task[tasks[0]])
        if found is None:
            raise ValueError(f"{arm} is measured on too few of {', '.join(tasks)} to be quoted")
        parts.append(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}] {unit}")
    return ", ".join(parts)


def covers(comparison: Comparison | None, tasks: Sequence[str] = CHOOSING) -> bool:
    """Whether an arm is measured on all of these tasks."""
    return comparison is not None and comparison.by_task.keys() >= set(tasks)
