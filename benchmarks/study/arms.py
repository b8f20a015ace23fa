"""Rows as arms: what is kept side by side, and the paired differences of two arms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.study.numerics import kind_of
from benchmarks.study.readouts import readouts_for
from benchmarks.study.statistics import Comparison, compare
from benchmarks.study.store import Row
from benchmarks.study.tasks import TASKS
from benchmarks.study.trainings import TRAININGS

OUTCOMES = {
    "loss": "test loss, %",
    "scaled": "loss after temperature scaling, %",
    "score": "score, points",
    "ece": "calibration error, points",
}
"""What is compared. Loss: 100 times the difference of the logarithms, so per cent. Scaled: likewise, the logits
divided by what fits the validation rows best, so that what is left is no matter of confidence. Score: the task's
own."""
LOSSES = {"loss": "nll", "scaled": "nll_scaled"}
BASELINES = {1: "decayed:last", **dict.fromkeys((2, 3, 4), "decayed2x:last")}
"""The arm that an arm of so many units is held against: of equal cost, or the dearest there is."""
FEWEST_SEEDS = 3
ORDER = [
    (name, readout)
    for name, training in TRAININGS.items()
    for readout in [*(known.name for known in readouts_for(training)), "chosen"]
]
"""Trainings and readouts, in the order in which pages show them."""


@dataclass(frozen=True)
class Kept:
    """Test rows that are shown, and those that are not.

    The arms of a regime, task and seed that share a baseline come from one kind of machine: that with the most of
    them. A training has one arithmetic on each kind.
    """

    rows: list[Row]
    others: list[Row]

    def arms(self, regime: str) -> list[str]:
        """Every arm of a regime, in the order of trainings and readouts."""
        found = {row["arm"]: row for row in self.rows if row["regime"] == regime}
        return sorted(found, key=lambda arm: ORDER.index((found[arm]["training"], found[arm]["readout"])))

    def values(
        self, regime: str, arm: str, outcome: str, rounding: str | None = None
    ) -> dict[tuple[str, int], float]:
        """An outcome by task and seed."""
        found = {}
        for (task, seed), row in self._places(regime, arm).items():
            numbers = row["outcomes"] if rounding is None else row.get("rounded", {}).get(rounding)
            if numbers is not None and _name_of(outcome, task) in numbers:
                found[task, seed] = value_of(numbers, task, outcome)
        return found

    def comparison(
        self,
        regime: str,
        arm: str,
        base: str,
        outcome: str,
        *,
        tasks: Collection[str] = tuple(TASKS),
        rounding: str | None = None,
    ) -> Comparison | None:
        """An arm minus another, paired by task, seed and kind of machine; None where no task has enough pairs."""
        ours, theirs = (self.values(regime, name, outcome, rounding) for name in (arm, base))
        kinds = [{at: kind_of(row) for at, row in self._places(regime, name).items()} for name in (arm, base)]
        paired = {at for at in ours.keys() & theirs.keys() if kinds[0][at] == kinds[1][at]}
        pairs = {}
        for task in [each for each in TASKS if each in tasks]:  # in one order, for one interval
            seeds = sorted(seed for t, seed in paired if t == task)
            if len(seeds) >= FEWEST_SEEDS:
                pairs[task] = np.array([ours[task, seed] - theirs[task, seed] for seed in seeds])
        return compare(pairs) if pairs else None

    def machines(self) -> dict[str, list[str]]:
        """The tasks measured on each kind of machine."""
        found = sorted({(kind_of(row), list(TASKS).index(row["task"])) for row in self.rows})
        return {kind: [list(TASKS)[place] for k, place in found if k == kind] for kind, _ in found}

    def _places(self, regime: str, arm: str) -> dict[tuple[str, int], Row]:
        """The row of an arm by task and seed."""
        return {(row["task"], row["seed"]): row for row in self.rows
                if row["regime"] == regime and row["arm"] == arm}  # fmt: skip


def value_of(numbers: dict[str, float], task: str, outcome: str) -> float:
    """An outcome on the scale on which it is compared; "nll" is the loss itself, in nats."""
    found = numbers[_name_of(outcome, task)]
    if outcome == "nll":
        return found
    return 100 * (math.log(max(found, 1e-12)) if outcome in LOSSES else found)


def _name_of(outcome: str, task: str) -> str:
    """What rows of a task call an outcome."""
    return TASKS[task].score if outcome == "score" else LOSSES.get(outcome, outcome)


def keep(rows: Sequence[Row]) -> Kept:
    """Choose the test rows that are shown: of arms that are compared, those of the machine that has the most."""
    tested = [row for row in rows if row["split"] == "test" and "failed" not in row]
    arithmetic = _most((kind_of(row), row["training"], row["fingerprint"]) for row in tested)
    same = [row for row in tested if arithmetic[kind_of(row), row["training"]] == row["fingerprint"]]
    machine = _most((*_compared(row), kind_of(row)) for row in same)
    kept = [row for row in same if machine[_compared(row)] == kind_of(row)]
    marked = {id(row) for row in kept}
    return Kept(kept, [row for row in tested if id(row) not in marked])


def _compared(row: Row) -> tuple[str, str, int, str]:
    """What rows have in common that are compared with one baseline."""
    return row["regime"], row["task"], row["seed"], BASELINES[cost_of(row["arm"])]


def _most(found: Iterable[tuple[Any, ...]]) -> dict[tuple[Any, ...], Any]:
    """By all parts but the last, the last part that is the most frequent; of equal ones the last by name."""
    counts, best = Counter(found), {}
    for *parts, last in sorted(counts, key=lambda each: (counts[each], each[-1])):
        best[tuple(parts)] = last
    return best


def cost_of(arm: str) -> int:
    """Forward-backward units of an arm's training."""
    return TRAININGS[arm.split(":")[0]].units
