"""Trains the model of a cell, and the teachers for distillation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.study import loop
from benchmarks.study import model as encoder
from benchmarks.study.numerics import PRECISION
from benchmarks.study.readouts import rules_for
from benchmarks.study.rivals import TEACHER
from benchmarks.study.rows import epoch_batches
from benchmarks.study.tasks import Splits
from benchmarks.study.trainings import TEACHER_RATES, TRAININGS, Training


@dataclass(frozen=True)
class Regime:
    """How much data there is, and the budget: the number of epochs with one pass."""

    rows: int
    epochs: int
    batch: int

    @property
    def title(self) -> str:
        """Its name in headings."""
        return f"{self.rows:,} training rows, {self.epochs} epochs"

    def times(self, factor: int) -> Regime:
        """The same, with the number of epochs multiplied."""
        return replace(self, epochs=factor * self.epochs)


REGIMES = {
    "main": Regime(rows=2500, epochs=2, batch=32),
    "small": Regime(rows=500, epochs=6, batch=16),
    "long": Regime(rows=2500, epochs=6, batch=32),
}


def fit(
    model: nn.Module,
    splits: Splits,
    training: Training,
    *,
    regime: Regime,
    rate: float,
    seed: int,
    averaged: Collection[str] | None = None,
    teacher: Tensor | None = None,
) -> loop.Trained:
    """Train a model in place.

    Args:
        model: initial.
        splits: the rows.
        training: how to train.
        regime: the budget.
        rate: peak learning rate.
        seed: of order, masks and noise.
        averaged: names of the averages to keep; None: all. Averages do not affect training.
        teacher: logits (N, C) for the training rows, for distillation.
    """
    places = [
        batch
        for epoch in range(regime.epochs * training.length)
        for batch in epoch_batches(splits.train, size=regime.batch, seed=seed, epoch=epoch)
    ]
    rules = {
        name: rule
        for name, rule in rules_for(training, len(places)).items()
        if averaged is None or name in averaged
    }
    taught = {} if teacher is None else {TEACHER: teacher}
    batches = (
        splits.train.batch(batch) | {name: logits[batch] for name, logits in taught.items()}
        for batch in places
    )
    return loop.train(
        model,
        batches,
        objective=training.objective(seed),
        schedule=training.schedule,
        rate=rate,
        total_steps=len(places),
        rules=rules,
        precision=PRECISION,
        seed=seed,
    )


def teach(splits: Splits, training: Training, *, task: str, regime: Regime, seed: int) -> Tensor | None:
    """Logits (N, C) of the mean of the teachers' probabilities on the training rows; None without teachers.

    Teachers are trained on the same rows, at their own rates; each has its own head, order and masks.
    """
    chances = []
    for i, name in enumerate(training.teachers):
        own = 1000 * (seed + 1) + i
        teacher = encoder.pretrained(splits.num_labels, own, device())
        rate = TEACHER_RATES[name][task]
        fit(teacher, splits, TRAININGS[name], regime=regime, rate=rate, seed=own, averaged=())
        chances.append(encoder.logits_of(teacher, splits.train).softmax(-1))
    return torch.stack(chances).mean(0).clamp(min=1e-12).log() if chances else None


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
