"""Rows as arms: what is kept side by side, and the paired differences of two arms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """Test rows of one kind of machine, with one arithmetic a training, and those that are not."""

    rows: list[Row]
    others: list[Row]
    machine: str

    def arms(self, regime: str) -> list[str]:
        """Every arm of a regime, in the order of trainings and readouts."""
        found = {row["arm"]: row for row in self.rows if row["regime"] == regime}
        return sorted(found, key=lambda arm: ORDER.index((found[arm]["training"], found[arm]["readout"])))

    def values(
        self, regime: str, arm: str, outcome: str, rounding: str | None = None
    ) -> dict[tuple[str, int], float]:
        """An outcome by task and seed."""
        found = {}
        for row in self.rows:
            if row["regime"] == regime and row["arm"] == arm:
                numbers = row["outcomes"] if rounding is None else row.get("rounded", {}).get(rounding)
                if numbers is not None and _name_of(outcome, row["task"]) in numbers:
                    found[row["task"], row["seed"]] = value_of(numbers, row["task"], outcome)
        return found

    def comparison(
        self,
        regime: str,
        arm: str,
        base: str,
        outcome: str,
        *,
        tasks: Iterable[str] = tuple(TASKS),
        rounding: str | None = None,
    ) -> Comparison | None:
        """An arm minus another, paired by task and seed; None where no task has enough pairs."""
        ours, theirs = (self.values(regime, name, outcome, rounding) for name in (arm, base))
        pairs = {}
        for task in tasks:
            seeds = sorted(seed for t, seed in ours if t == task and (task, seed) in theirs)
            if len(seeds) >= FEWEST_SEEDS:
                pairs[task] = np.array([ours[task, seed] - theirs[task, seed] for seed in seeds])
        return compare(pairs) if pairs else None


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
    """Of the test rows, those of the machine with the most, and of each training the arithmetic with the most."""
    tested = [row for row in rows if row["split"] == "test" and "failed" not in row]
    machines = Counter(kind_of(row) for row in tested or rows)
    machine = machines.most_common(1)[0][0] if machines else ""
    here = [row for row in tested if kind_of(row) == machine]
    arithmetic = {
        training: Counter(row["fingerprint"] for row in here if row["training"] == training).most_common(1)[
            0
        ][0]
        for training in {row["training"] for row in here}
    }
    kept = [row for row in here if row["fingerprint"] == arithmetic[row["training"]]]
    marked = {id(row) for row in kept}
    return Kept(kept, [row for row in tested if id(row) not in marked], machine)


def cost_of(arm: str) -> int:
    """Forward-backward units of an arm's training."""
    return TRAININGS[arm.split(":")[0]].units
