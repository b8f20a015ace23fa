"""Measurements on a trained model: outcomes of its readouts on the test rows, or on the validation rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from benchmarks.study.loop import Trained
from benchmarks.study.model import ROUNDINGS, changed
from benchmarks.study.outcomes import outcomes, temperature
from benchmarks.study.readouts import RECOMMENDED, Readout, readouts_for, searched
from benchmarks.study.store import Row
from benchmarks.study.tasks import Splits, Task, predict
from benchmarks.study.trainings import Training


def score_validation(
    model: nn.Module, trained: Trained, training: Training, splits: Splits, task: Task
) -> dict[str, Row]:
    """Outcomes on the validation rows, for the readouts by which a rate may be chosen."""
    found = {}
    for readout in principal_readouts(training):
        with in_place(model, trained.averager, readout):
            scored = predict(task, model, splits.validation).outcomes(scored=not task.generates)
            found[readout.name] = {"outcomes": scored}
    return found


def score_test(
    model: nn.Module, trained: Trained, training: Training, splits: Splits, task: Task
) -> dict[str, Row]:
    """Outcomes on the test rows for every readout, and for the one chosen by the validation rows."""
    found: dict[str, Row] = {}
    validation = {}
    for readout in readouts_for(training):
        with in_place(model, trained.averager, readout):
            tested, validated = (predict(task, model, rows) for rows in (splits.test, splits.validation))
            row: Row = {"outcomes": tested.outcomes(scored=readout.rounded or not task.generates)}
            if tested.scales:
                row["temperature"] = temperature(validated.logits, validated.labels)
                scaled = outcomes(tested.logits / row["temperature"], tested.labels, "accuracy")
                row["outcomes"]["nll_scaled"] = scaled["nll"]
            if readout.name in searched(training) and (readout.rounded or not task.generates):
                validation[readout.name] = validated.outcomes(scored=False)["nll"]
            if readout.rounded:
                row["rounded"] = {}
                for name, rounding in ROUNDINGS.items():
                    with changed(model, rounding):
                        rounded = predict(task, model, splits.test)
                        row["rounded"][name] = rounded.outcomes(scored=not task.generates)
        found[readout.name] = row
    best = min(validation, key=lambda name: validation[name])
    found["chosen"] = {"outcomes": found[best]["outcomes"], "chosen": best, "validation_nll": validation}
    return found


def principal_readouts(training: Training) -> list[Readout]:
    """The last weights, and the readout by which a training is judged."""
    return [readout for readout in readouts_for(training) if readout.name in {"last", training.principal}]


def recommended_readouts(training: Training) -> list[Readout]:
    """The last weights, and the recommended average of a constant training."""
    return [readout for readout in readouts_for(training) if readout.name in {"last", RECOMMENDED}]


@contextmanager
def in_place(model: nn.Module, averager: Any, readout: Readout) -> Iterator[None]:
    """Give the model the weights of a readout for a while."""
    if readout.rule is None:
        yield
        return
    with averager.swapped_in(readout.rule, blend=readout.blend):
        yield
