"""Rows as arms: which rows are compared, and the paired differences of two arms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.study.grid import at_chosen_rates, chosen_rate, tried
from benchmarks.study.numerics import kind_of
from benchmarks.study.readouts import readouts_for
from benchmarks.study.statistics import Comparison, compare
from benchmarks.study.store import Row
from benchmarks.study.tasks import TASKS
from benchmarks.study.trainings import BASELINES, TRAININGS

OUTCOMES = {
    "loss": "test loss, %",
    "scaled": "loss after temperature scaling, %",
    "score": "score, points",
    "ece": "calibration error, points",
}
"""What is compared. Loss: its relative change; means are geometric. Scaled: the same, with logits divided by the
temperature that fits the validation rows best, which removes the effect of confidence. Score: the task's own."""
LOSSES = {"loss": "nll", "scaled": "nll_scaled"}
FEWEST_SEEDS = 3
EPOCHS_CHOSEN = "epochs chosen"
BUDGETS = {
    "decayed2x": (("main", "decayed"), ("main", "decayed2x"), ("long", "decayed2x")),
    "r4f-relative-1.0-decayed": (("main", "r4f-relative-1.0-decayed"), ("long", "r4f-relative-1.0-decayed")),
}
"""Regimes and trainings among which the number of epochs is chosen: up to 12 of one pass, or 6 of two. By the
training that they are shown as."""
ORDER = [
    (name, readout)
    for name, training in TRAININGS.items()
    for readout in [*(known.name for known in readouts_for(training)), "chosen"]
]
"""Trainings and readouts, in the order in which pages show them."""


@dataclass(frozen=True)
class Kept:
    """Test rows that are shown, and those that are not.

    A training of a regime, task and seed comes from one kind of machine, and is compared with the baseline made on
    that kind. The kind must have both; if several do, it is the one with the most rows that share this baseline. On
    each kind a training has one arithmetic. Its rate is the chosen one, if the tuning rows choose one.
    """

    rows: list[Row]
    bases: list[Row]
    """Baseline rows from other kinds of machines: only for comparison with arms made there."""
    others: list[Row]

    def arms(self, regime: str) -> list[str]:
        """Every arm of a regime, in the order of trainings and readouts."""
        found = {row["arm"]: row for row in self.rows if row["regime"] == regime}
        return sorted(found, key=lambda arm: ORDER.index((found[arm]["training"], found[arm]["readout"])))

    def values(
        self, regime: str, arm: str, outcome: str, rounding: str | None = None
    ) -> dict[tuple[str, int], float]:
        """An outcome by task and seed."""
        rows = _of(self.rows, regime, arm)
        found = {(row["task"], row["seed"]): _outcome_of(row, outcome, rounding) for row in rows}
        return {at: value for at, value in found.items() if value is not None}

    def comparison(
        self,
        regime: str,
        arm: str,
        base: str,
        outcome: str,
        *,
        tasks: Collection[str] = tuple(TASKS),
        seeds: Collection[int] | None = None,
        rounding: str | None = None,
    ) -> Comparison | None:
        """An arm minus another, paired by task, seed and kind of machine; None if no task has enough pairs.

        Args:
            regime: of both.
            arm: training and readout.
            base: what it is compared with.
            outcome: one of `OUTCOMES`.
            tasks: those to compare on.
            seeds: those to compare on; None for all.
            rounding: of the weights; None for the weights themselves.
        """
        ours, theirs = (
            {(row["task"], row["seed"], kind_of(row)): _outcome_of(row, outcome, rounding) for row in rows}
            for rows in (_of(self.rows, regime, arm), _of(self.rows + self.bases, regime, base))
        )
        found: dict[str, list[float]] = {}
        for at in sorted(ours.keys() & theirs.keys()):
            own, other = ours[at], theirs[at]
            if own is not None and other is not None and (seeds is None or at[1] in seeds):
                found.setdefault(at[0], []).append(own - other)
        pairs = {
            task: np.array(found[task])
            for task in TASKS  # in one order, for one interval
            if task in tasks and len(found.get(task, ())) >= FEWEST_SEEDS
        }
        if not pairs:
            return None
        return compare(pairs).rescaled(percent) if outcome in LOSSES else compare(pairs)

    def from_baseline(self, regime: str, arm: str, outcome: str, **which: Any) -> Comparison | None:
        """An arm minus its baseline, on the tasks, seeds and rounding of `comparison`; None for a baseline."""
        base = BASELINES[cost_of(arm)]
        return None if base == arm else self.comparison(regime, arm, base, outcome, **which)

    def machines(self) -> dict[str, list[str]]:
        """The tasks measured on each kind of machine."""
        found = sorted({(kind_of(row), list(TASKS).index(row["task"])) for row in self.rows})
        return {kind: [list(TASKS)[place] for k, place in found if k == kind] for kind, _ in found}


def with_epochs_chosen(kept: Kept, rows: Sequence[Row]) -> Kept:
    """Beside the rows kept, as the regime `EPOCHS_CHOSEN`: the last weights of `BUDGETS`.

    Each task's come from the budget with the lowest loss on the validation rows. Only tasks on which all budgets
    have been tuned.
    """
    chosen = []
    for task in TASKS:
        best = {name: _best_budget(task, among, rows) for name, among in BUDGETS.items()}
        if None not in best.values():
            chosen += [
                row | {"regime": EPOCHS_CHOSEN, "arm": f"{name}:last"}
                for name, budget in best.items()
                for row in kept.rows + kept.bases
                if (row["task"], row["readout"], row["regime"], row["training"]) == (task, "last", *budget)
            ]
    return replace(kept, rows=[*kept.rows, *chosen])


def _best_budget(task: str, among: Sequence[tuple[str, str]], rows: Sequence[Row]) -> tuple[str, str] | None:
    """The regime and training with the lowest loss on the validation rows; None before all have been tuned."""
    if any(chosen_rate(training, regime, task, rows) is None for regime, training in among):
        return None
    return min(among, key=lambda each: min(tried(each[1], each[0], task, rows).values()))


def _of(rows: Sequence[Row], regime: str, arm: str) -> list[Row]:
    return [row for row in rows if row["regime"] == regime and row["arm"] == arm]


def _outcome_of(row: Row, outcome: str, rounding: str | None) -> float | None:
    """An outcome of a row; None if it was not measured."""
    numbers = row["outcomes"] if rounding is None else row.get("rounded", {}).get(rounding)
    if numbers is None or _name_of(outcome, row["task"]) not in numbers:
        return None
    return value_of(numbers, row["task"], outcome)


def value_of(numbers: dict[str, float], task: str, outcome: str) -> float:
    """An outcome on the scale on which it is averaged: losses as logarithms; "nll" is the loss itself, in nats."""
    found = numbers[_name_of(outcome, task)]
    if outcome == "nll":
        return found
    return math.log(max(found, 1e-12)) if outcome in LOSSES else 100 * found


def percent(difference: float) -> float:
    """The relative change, in per cent, that a difference of logarithms amounts to."""
    return 100 * math.expm1(difference)


def _name_of(outcome: str, task: str) -> str:
    """What rows of a task call an outcome."""
    return TASKS[task].score if outcome == "score" else LOSSES.get(outcome, outcome)


def keep(rows: Sequence[Row]) -> Kept:
    """Choose the test rows to show, each from a machine that also has its baseline, if there is one."""
    tested = [row for row in rows if row["split"] == "test" and "failed" not in row]
    right = at_chosen_rates(tested, rows)
    counts = Counter((kind_of(row), row["training"], row["fingerprint"]) for row in right)
    arithmetic = {each[:2]: each[2] for each in sorted(counts, key=lambda each: (counts[each], each[2]))}
    same = [row for row in right if arithmetic[kind_of(row), row["training"]] == row["fingerprint"]]
    bases = {_pair_of(row): row for row in same if row["arm"] == _base_of(row)}
    shared = Counter(map(_pair_of, same))
    machine: dict[tuple[Any, ...], str] = {}
    for row in sorted(same, key=lambda row: (_pair_of(row) in bases, shared[_pair_of(row)], kind_of(row))):
        machine[_made(row)] = kind_of(row)
    kept = [row for row in same if machine[_made(row)] == kind_of(row)]
    shown = {id(row) for row in kept}
    beside = [row for row in bases.values() if id(row) not in shown]
    shown |= {id(row) for row in beside}
    return Kept(kept, beside, [row for row in tested if id(row) not in shown])


def _made(row: Row) -> tuple[str, str, int, str]:
    """What the readouts of one training have in common, on any machine."""
    return row["regime"], row["task"], row["seed"], row["training"]


def _pair_of(row: Row) -> tuple[str, str, int, str, str]:
    """What a row has in common with its baseline, and with everything compared to that."""
    return row["regime"], row["task"], row["seed"], _base_of(row), kind_of(row)


def _base_of(row: Row) -> str:
    return BASELINES[cost_of(row["arm"])]


def cost_of(arm: str) -> int:
    """Forward-backward units of an arm's training."""
    return TRAININGS[arm.split(":")[0]].units
