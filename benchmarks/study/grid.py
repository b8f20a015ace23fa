"""Which cells there are, in what order they run, and the rules by which settings and defaults are chosen.

Rules, written down before any row of a confirming task was made:

* **Rate.** The search on the validation rows is the same for every training and task, with a seed that no reported
  cell uses: ``FIRST_RATES``, then half or twice the better one, until the loss of the principal readout (the last
  weights of a decayed training, SWA from 0.5 of a constant one) rises or the ``RATES`` end. In a tie, the lower
  rate. A cell that failed leaves its rate open. Every regime is tuned separately, in the same way. A rate found on
  one kind of machine is used on every kind. (Amended below.)
* **Machines.** A training is compared with its baseline of the same seed made on the same kind of machine. A pair
  that exists on one kind is not run again on another.
* **Budget.** Epochs are not chosen by score: one budget is the regime's number of epochs with one pass. A training
  with two passes, or one twice as long, costs two. So compared costs are equal by construction.
* **Default averaging rule.** Among the readouts of the decayed and the constant training whose mean difference in
  the task's score is not below 0: the one with the lowest mean, over the choosing tasks, of the paired difference
  in test loss from `decayed:last`. If none is ahead on loss with a 95 % interval over tasks that excludes 0: the
  last weights of the decayed training. The readout chosen on validation rows is no rule, and not among them.
* **Default objective.** The same among the readouts of the main two-pass trainings, against `decayed2x:last`, once
  all of them have been measured on every choosing task, or cannot be ahead whatever the remaining tasks give. It
  must also be ahead of the same readout of the plain loss, trained twice as long: what averaging gains is not the
  objective's.
* Both are chosen from ``DECIDING_SEEDS`` alone, so that more seeds and trainings do not change them afterwards.
* Confirming tasks are looked at once, after the choice that they confirm, and then change nothing.

Amended on 2026-11-30, when averaging had been measured on all eight tasks and the objectives on the choosing ones.
Neither changes what was chosen:

* A training that cannot be ahead any more need not be measured on every choosing task; before, the choice was open.
* ``RATES`` were 2.5e-5 to 8e-4; two lower ones and a higher one let searches go on that had ended at the edge.

Amended again on the same day, for 500 rows alone, when `constant:ema-0.1` had been measured on four tasks with
three seeds, and had 132 % more loss than `decayed:last` on sst2:

* Two rates on either side of the best must be worse (``BESIDE``). The loss on 500 rows has two valleys, an
  underfitted one at low rates and an overfitted one at high rates. On sst2 the search had stopped in the upper
  valley for the constant training and reached the lower one for the decayed training.

And on the same day for SMART and FreeLB, when they had been measured on sst2 with three seeds:

* Their noise has the size that their authors' code gives it. It had been 0.3 of each token's length, several times
  as large for FreeLB, and more than ten times for SMART. With it FreeLB did not learn (50.1 % at every rate), and
  SMART lost 4 points. Those rows are not shown.

And on 2026-12-01, when the objectives had been measured on the choosing tasks and on 500 rows:

* A third regime, ``long``: in the main one an objective of two passes trains for 2 epochs, and on trec and
  banking77 the baseline's further epochs gained more than any objective. It shows what objectives gain where
  training longer no longer does. It chooses nothing.
* With it, the number of epochs is chosen on the validation rows as well (``BUDGETS``). This was added when ``long``
  had been measured on trec and in part on sst2, where 12 epochs of the plain loss were no better than 4.
* In ``long``, too, two rates on either side of the best must be worse. On mpqa the search of the plain loss had
  stopped in the overfitted valley, with 80 % more loss than after 2 epochs. Its three rows are not shown.

And later that day, when R4F had been measured with epochs chosen on sst2, trec and cr (-8, -17 and -18 % of test
loss, +0.5, +0.1 and +1.6 points of score). Nothing was known on subj and mrpc, and one regime on the others: no
difference on mpqa (``long``) and cola (main), and R4F is behind on banking77 (main).

* To be confirmed: with epochs chosen, R4F has less test loss than the plain loss, and scores no lower. It counts as
  confirmed if over all eight tasks the interval of the loss is below 0, and the mean of the score is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.study.cell import Cell
from benchmarks.study.numerics import kind_of
from benchmarks.study.store import Row, finished
from benchmarks.study.trainings import BASELINE, BASELINES, TRAININGS

DIVERGED = "are not finite"
"""In the error of a training that averages weights, once they are not finite."""

CHOOSING = ("sst2", "trec", "cr", "banking77")
CONFIRMING = ("cola", "mpqa", "subj", "mrpc")
CHEAPEST = ("mpqa", "cola", "trec", "sst2", "cr", "subj")
"""Those of both whose cells cost least. They get all seeds first."""
GENERAL = ("e2e-new", "squad", "tatoeba-new", "e2e-encoder", "tatoeba-encoder")
"""Besides classification: used neither to choose nor to confirm, but to show how far the findings generalise."""
RATES = (6.25e-6, 1.25e-5, 2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
"""At 2.5e-5, once the lowest, the loss of some longer runs was still falling."""
FIRST_RATES = (1e-4, 2e-4)
BESIDE = {"main": 1, "small": 2, "long": 2}
"""How many rates on either side of the best one a search must have tried before it ends."""
TUNING_SEED = 101
SEEDS = tuple(range(1, 11))
DECIDING_SEEDS = SEEDS[:3]

AVERAGING = ("decayed", "constant")
LONGER = ("decayed2x", "constant2x")
OBJECTIVES = (
    "rdrop-decayed",
    "rdrop-constant",
    "r3f-independent-decayed",
    "r3f-independent-constant",
    "r3f-relative-1.0-decayed",
    "r3f-relative-1.0-constant",
)
NOISE = ("rdrop-decayed", "r3f-relative-1.0-decayed", "r4f-relative-1.0-decayed")
R4F_AND_PLAIN = ("decayed2x", "r4f-relative-1.0-decayed")
"""The objective that is ahead in longer runs, and what it is compared with."""
MAIN = AVERAGING + LONGER + OBJECTIVES
COLLAPSED = (*AVERAGING, "decayed2x", *NOISE)
SAME_RATE = ("probe", "cycle")
"""Splits in which every training uses the baseline's rate, because how far a training changes the encoder depends
mostly on the rate."""
RIVALS = ("smart-decayed", "freelb-decayed", "distilled-longer", "distilled-ensemble")
REST = tuple(name for name in TRAININGS if name not in MAIN)


@dataclass(frozen=True)
class Phase:
    """Trainings that are tuned first, then run on some tasks with some seeds, seed by seed."""

    trainings: Sequence[str]
    regime: str
    tasks: Sequence[str]
    seeds: Sequence[int]
    split: str = "test"


def _each(trainings: Sequence[str], tasks: Sequence[str], regime: str = "main") -> list[Phase]:
    return [Phase(trainings, regime, (task,), DECIDING_SEEDS) for task in tasks]


PHASES = (
    *_each(AVERAGING, CHOOSING + CONFIRMING),
    *_each(LONGER, CHOOSING),
    Phase(AVERAGING, "small", CHEAPEST[:4], DECIDING_SEEDS),
    Phase(AVERAGING, "main", CHEAPEST, SEEDS),
    *_each(AVERAGING, GENERAL[:1]),
    # At least something of every kind: the cheapest tasks, few seeds.
    Phase(AVERAGING, "main", CHOOSING[:1], DECIDING_SEEDS, "flatness"),
    Phase(COLLAPSED, "main", CHOOSING[:1], DECIDING_SEEDS, "probe"),
    *_each((*RIVALS, "r4f-relative-1.0-decayed"), CHOOSING[:2]),
    # R4F has less loss than decayed2x on sst2, trec and cr, and more on banking77.
    *_each(("r4f-relative-1.0-decayed",), CHOOSING[2:]),
    *_each(AVERAGING, GENERAL[1:2]),
    # Regularisation is said to matter most when there is little data.
    *_each(("decayed2x", *NOISE), ("sst2", "trec", "mpqa"), "small"),
    # In the main regime two passes mean two epochs, and training longer gains most.
    *_each(R4F_AND_PLAIN, ("trec", "sst2", "mpqa", "cr"), "long"),
    *(
        Phase(R4F_AND_PLAIN, each, (task,), DECIDING_SEEDS)
        for task in CONFIRMING
        for each in ("main", "long")
    ),
    *_each(R4F_AND_PLAIN, ("banking77",), "long"),
    *_each(AVERAGING, ("e2e-encoder", "tatoeba-new", "tatoeba-encoder")),
    *_each(AVERAGING, ("trec", "sst2", "mpqa", "cr"), "long"),
    Phase(COLLAPSED, "main", CHOOSING[:1], DECIDING_SEEDS[:1], "cycle"),
    Phase(COLLAPSED, "main", CHOOSING[:1], DECIDING_SEEDS, "cycle"),
    Phase(AVERAGING, "main", CHOOSING[1:3], DECIDING_SEEDS, "flatness"),
    *_each(OBJECTIVES, CHOOSING),
    *_each(LONGER, CONFIRMING),
    *_each(OBJECTIVES, CONFIRMING),
    Phase(MAIN, "main", CHOOSING, SEEDS),
    Phase(MAIN, "main", CONFIRMING, SEEDS),
    Phase(MAIN, "main", GENERAL, SEEDS[:5]),
    Phase(MAIN, "small", CHOOSING + CONFIRMING, SEEDS),
    Phase(REST, "main", CHOOSING, SEEDS[:5]),
    Phase([name for name in REST if not TRAININGS[name].teachers], "main", CONFIRMING, SEEDS[:5]),
    Phase(COLLAPSED, "main", ("sst2",), SEEDS[:5], "probe"),
    Phase(AVERAGING, "main", CHOOSING, DECIDING_SEEDS, "flatness"),
)


def tuning_cell(training: str, regime: str, task: str, rate: float) -> Cell:
    """The cell that tries a rate."""
    return Cell(task, training, regime, rate, TUNING_SEED, "tuning")


def tried(training: str, regime: str, task: str, rows: Iterable[Row]) -> dict[float, float]:
    """Loss of the principal readout for each rate tried; infinite if it is NaN, or if the training diverged.

    A cell that failed for another reason says nothing about its rate, so the search waits until it is made.
    """
    named = {tuning_cell(training, regime, task, rate).name: rate for rate in RATES}
    losses = {}
    for row in rows:
        rate = named.get(row["cell"])
        if rate is not None and _diverged(row):
            losses[rate] = math.inf
        elif rate is not None and row["readout"] == TRAININGS[training].principal:
            loss = row["outcomes"]["nll"]
            losses[rate] = math.inf if math.isnan(loss) else loss
    return losses


def _diverged(row: Row) -> bool:
    return DIVERGED in row.get("failed", "")


def missing_rates(losses: Mapping[float, float], regime: str) -> list[float]:
    """The rates the search tries next; none once it has ended."""
    missing = [rate for rate in FIRST_RATES if rate not in losses]
    if missing:
        return missing
    place = RATES.index(best_rate(losses))
    beside = RATES[max(0, place - BESIDE[regime]) : place + BESIDE[regime] + 1]
    return [rate for rate in beside if rate not in losses]


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss; the lower one in a tie."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def chosen_rate(training: str, regime: str, task: str, rows: Iterable[Row]) -> float | None:
    """The rate chosen by the tuning rows; None while the search goes on, or if every rate fails."""
    losses = tried(training, regime, task, rows)
    if missing_rates(losses, regime):
        return None
    best = best_rate(losses)
    return best if math.isfinite(losses[best]) else None


def at_chosen_rates(some: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
    """Those of some rows whose rate is the one chosen by the tuning rows among all, or still open."""
    tuning = [row for row in rows if row["split"] == "tuning"]
    chosen = cache(lambda training, regime, task: chosen_rate(training, regime, task, tuning))
    return [
        row
        for row in some
        if chosen(tuned(row["training"], row["split"]), row["regime"], row["task"]) in (None, row["rate"])
    ]


def tuned(training: str, split: str) -> str:
    """The training whose learning rate a training uses in a split."""
    return BASELINE if split in SAME_RATE else training


def cells_of(phase: Phase, rows: Sequence[Row]) -> Iterator[Cell]:
    """The cells of a phase in the order they run, without those whose rate is still open."""
    rates = {}
    for task in phase.tasks:
        for name in dict.fromkeys(tuned(name, phase.split) for name in phase.trainings):
            losses = tried(name, phase.regime, task, rows)
            for rate in (*losses, *missing_rates(losses, phase.regime)):
                yield tuning_cell(name, phase.regime, task, rate)
            rates[task, name] = chosen_rate(name, phase.regime, task, rows)
    for seed in phase.seeds:
        for task in phase.tasks:
            for name in phase.trainings:
                rate = rates[task, tuned(name, phase.split)]
                if rate is not None:
                    yield Cell(task, name, phase.regime, rate, seed, phase.split)


def all_cells(rows: Sequence[Row]) -> Iterator[Cell]:
    """Every cell whose settings the tuning rows determine, most wanted first, each once."""
    return _once(cell for phase in PHASES for cell in cells_of(phase, rows))


def _once(cells: Iterable[Cell]) -> Iterator[Cell]:
    seen = set()
    for cell in cells:
        if cell not in seen:
            seen.add(cell)
            yield cell


class Made:
    """Which cells are done, on which kind of machine, and which are left for this one.

    Args:
        rows: rows from all machines. A failure counts where it happened, elsewhere only if the training diverged.
        here: this kind of machine.
    """

    def __init__(self, rows: Sequence[Row], here: str):
        self._tuning = [row for row in rows if row["cell"].endswith("/tuning")]
        self._rate = cache(lambda training, regime, task: chosen_rate(training, regime, task, self._tuning))
        self._here = here
        made = [row for row in rows if "failed" not in row or _diverged(row) or kind_of(row) == here]
        kinds = {kind_of(row) for row in made}
        self._done = {kind: finished(row for row in made if kind_of(row) == kind) for kind in kinds | {here}}
        self._names = {kind: {name for name, _ in done} for kind, done in self._done.items()}

    def missing(self) -> Iterator[Cell]:
        """Cells to run here, most wanted first, each once and after the baseline it needs here."""
        wanted = (cell for cell in all_cells(self._tuning) if not self.there(cell))
        return _once(each for cell in wanted for each in self._pair(cell) if not self.on(self._here, each))

    def there(self, cell: Cell) -> bool:
        """Whether some kind of machine has a cell together with the baseline it is compared with."""
        return any(all(self.on(kind, each) for each in self._pair(cell)) for kind in self._done)

    def on(self, kind: str, cell: Cell) -> bool:
        """Whether a kind of machine has a cell; on this kind, with the current arithmetic."""
        if kind == self._here:
            return (cell.name, cell.fingerprint) in self._done[kind]
        return cell.name in self._names[kind]

    def _pair(self, cell: Cell) -> list[Cell]:
        """A cell after the baselines it is compared with; only the cell if it tries a rate."""
        if cell.split == "tuning":
            return [cell]
        units = TRAININGS[cell.training].units if cell.split == "test" else 1
        bases = [(BASELINES[units].partition(":")[0], cell.regime)]
        if cell.regime == "long":  # if epochs are chosen, the plain loss may be best after few
            bases.append((BASELINE, "main"))
        pair = []
        for training, regime in bases:
            if (training, regime) != (cell.training, cell.regime):
                rate = self._rate(training, regime, cell.task)
                if rate is None:
                    return []
                pair.append(replace(cell, training=training, regime=regime, rate=rate))
        return [*pair, cell]
