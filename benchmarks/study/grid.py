"""Which cells there are, in what order they run, and the rules by which settings and defaults are chosen.

Rules, written down before any row of a confirming task was made:

* **Rate.** Every training has the same trials: ``RATES`` on the tuning tasks, two of the choosing ones,
  with the tuning seeds, which no reported cell uses. Its rate is that with the lowest mean over these cells of the
  logarithm of the validation loss of its principal readout (last of a decayed training, SWA from 0.5 of a constant
  one). Of equal ones, the lower rate. The regime of 500 rows is tuned by itself, in the same way.
* **Budget.** Epochs are not chosen by score: one budget is the regime's number of epochs of one pass. A training of
  two passes, and one that is twice as long, cost two. So comparisons at equal cost are that by construction.
* **Default averaging rule.** Among the readouts of the decayed and of the constant training, that with the lowest
  mean over the choosing tasks of the paired difference in test loss to `decayed:last`, whose mean difference in the
  task's score is not below 0. Where none is ahead on loss with its 95 % interval over tasks clear of 0: the last
  weights of the decayed training.
* **Default objective.** Among all two-pass trainings, and readouts of them, likewise against `decayed2x:last`.
* Confirming tasks are looked at once, after both are chosen, and then change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.study.cell import Cell
from benchmarks.study.store import Row
from benchmarks.study.trainings import TRAININGS

CHOOSING = ("trec", "sst2", "cr", "banking77")
CONFIRMING = ("cola", "mpqa", "subj", "mrpc")
TUNING_TASKS = ("sst2", "banking77")
RATES = (1e-4, 2e-4, 4e-4)
TUNING_SEEDS = (101,)
SEEDS = tuple(range(1, 11))

AVERAGING = ("decayed", "constant")
LONGER = ("decayed2x", "rdrop-decayed", "rdrop-constant")
NOISE = (
    "r3f-independent-decayed",
    "r3f-independent-constant",
    "r3f-relative-0.3-decayed",
    "r3f-relative-0.3-constant",
)
MAIN = AVERAGING + LONGER + NOISE
COLLAPSED = (*AVERAGING, "rdrop-decayed", "r3f-relative-0.3-decayed", "r4f-relative-0.3-decayed")
REST = tuple(name for name in TRAININGS if name not in MAIN)


@dataclass(frozen=True)
class Phase:
    """Trainings that are tuned first, then run on some tasks by some seeds, seed by seed."""

    trainings: Sequence[str]
    regime: str
    tasks: Sequence[str]
    seeds: Sequence[int]
    split: str = "test"


PHASES = (
    *(Phase(trainings, "main", CHOOSING, SEEDS[:3]) for trainings in (AVERAGING, LONGER, NOISE)),
    Phase(MAIN, "main", CHOOSING, SEEDS),
    Phase(MAIN, "main", CONFIRMING, SEEDS),
    Phase(MAIN, "small", CHOOSING + CONFIRMING, SEEDS),
    Phase(REST, "main", CHOOSING, SEEDS[:5]),
    Phase(REST, "main", CONFIRMING, SEEDS[:5]),
    Phase(COLLAPSED, "main", ("sst2",), SEEDS[:5], "probe"),
    Phase(COLLAPSED, "small", ("sst2",), SEEDS[:3], "cycle"),
    Phase(AVERAGING, "main", CHOOSING, SEEDS[:3], "flatness"),
)


def tuning_cells(training: str, regime: str) -> list[Cell]:
    """The cells by which a training's rate is chosen."""
    return [
        Cell(task, training, regime, rate, seed, "tuning")
        for seed in TUNING_SEEDS
        for task in TUNING_TASKS
        for rate in RATES
    ]


def chosen_rate(training: str, regime: str, rows: Iterable[Row]) -> float | None:
    """The rate that the tuning rows choose; None while one of them is missing.

    A rate at which a cell failed, or came to no number, is out.
    """
    wanted = {cell.name: cell.rate for cell in tuning_cells(training, regime)}
    principal = TRAININGS[training].principal
    losses: dict[float, list[float]] = {rate: [] for rate in RATES}
    seen = set()
    for row in rows:
        rate = wanted.get(row["cell"])
        if rate is not None and ("failed" in row or row["readout"] == principal):
            seen.add(row["cell"])
            loss = math.inf if "failed" in row else math.log(row["outcomes"]["nll"])
            losses[rate].append(loss if not math.isnan(loss) else math.inf)
    if seen < wanted.keys():
        return None
    means = {rate: sum(values) / len(values) for rate, values in losses.items()}
    best = min(means.values())
    return min(rate for rate, mean in means.items() if mean == best) if math.isfinite(best) else None


def cells_of(phase: Phase, rows: Sequence[Row]) -> Iterator[Cell]:
    """The cells of a phase in the order they are made; those whose rate is still open are left out."""
    rates = {name: chosen_rate(name, phase.regime, rows) for name in phase.trainings}
    for name in phase.trainings:
        yield from tuning_cells(name, phase.regime)
    for seed in phase.seeds:
        for task in phase.tasks:
            for name in phase.trainings:
                rate = rates[name]
                if rate is not None:
                    yield Cell(task, name, phase.regime, rate, seed, phase.split)


def all_cells(rows: Sequence[Row]) -> Iterator[Cell]:
    """Every cell whose settings are known, most wanted first, each once."""
    seen = set()
    for phase in PHASES:
        for cell in cells_of(phase, rows):
            if cell not in seen:
                seen.add(cell)
                yield cell
