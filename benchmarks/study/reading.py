"""What is measured on a trained model: outcomes of its readouts on the test rows, or on those that choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from benchmarks.study.loop import Trained
from benchmarks.study.model import ROUNDINGS, changed, logits_of
from benchmarks.study.outcomes import outcomes, temperature
from benchmarks.study.readouts import Readout, readouts_for, searched
from benchmarks.study.store import Row
from benchmarks.study.tasks import Rows, Splits
from benchmarks.study.trainings import Training


def score_validation(
    model: nn.Module, trained: Trained, training: Training, splits: Splits, score: str
) -> dict[str, Row]:
    """Outcomes on the validation rows, of the readouts by which a rate may be chosen."""
    found = {}
    for readout in principal_readouts(training):
        with in_place(model, trained.averager, readout):
            found[readout.name] = {"outcomes": outcomes_of(model, splits.validation, score)}
    return found


def score_test(
    model: nn.Module, trained: Trained, training: Training, splits: Splits, score: str
) -> dict[str, Row]:
    """Outcomes on the test rows of every readout, and of that which the validation rows choose."""
    found: dict[str, Row] = {}
    validation = {}
    for readout in readouts_for(training):
        with in_place(model, trained.averager, readout):
            logits, chosen_on = logits_of(model, splits.test), logits_of(model, splits.validation)
            scale = temperature(chosen_on, splits.validation.labels)
            scaled = outcomes(logits / scale, splits.test.labels, score)
            row: Row = {
                "outcomes": outcomes(logits, splits.test.labels, score) | {"nll_scaled": scaled["nll"]},
                "temperature": scale,
            }
            if readout.name in searched(training):
                validation[readout.name] = outcomes(chosen_on, splits.validation.labels, score)["nll"]
            if readout.rounded:
                row["rounded"] = {}
                for name, rounding in ROUNDINGS.items():
                    with changed(model, rounding):
                        row["rounded"][name] = outcomes_of(model, splits.test, score)
        found[readout.name] = row
    best = min(validation, key=lambda name: validation[name])
    found["chosen"] = {"outcomes": found[best]["outcomes"], "chosen": best, "validation_nll": validation}
    return found


def principal_readouts(training: Training) -> list[Readout]:
    """The last weights, and the readout by which a training is judged."""
    return [readout for readout in readouts_for(training) if readout.name in {"last", training.principal}]


def outcomes_of(model: nn.Module, rows: Rows, score: str) -> dict[str, float]:
    """Outcomes of the weights that are in place."""
    return outcomes(logits_of(model, rows), rows.labels, score)


@contextmanager
def in_place(model: nn.Module, averager: Any, readout: Readout) -> Iterator[None]:
    """The model with the weights of a readout, for a while."""
    if readout.rule is None:
        yield
        return
    with averager.swapped_in(readout.rule, blend=readout.blend):
        yield
