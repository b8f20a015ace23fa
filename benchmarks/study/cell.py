"""One cell: a training of one task by one seed, and all that is read out of it."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study import loop
from benchmarks.study.model import ROUNDINGS, changed, logits_of, pretrained
from benchmarks.study.numerics import fingerprint, machine
from benchmarks.study.outcomes import outcomes
from benchmarks.study.readouts import Readout, readouts_for, rules_for, searched
from benchmarks.study.rivals import TEACHER
from benchmarks.study.store import Row
from benchmarks.study.tasks import MAX_LENGTH, TASKS, Rows, Splits, epoch_batches, load
from benchmarks.study.trainings import TRAININGS, Training

PRECISION = "bf16"


@dataclass(frozen=True)
class Regime:
    """How much data there is, and the budget: so many epochs of one pass."""

    rows: int
    epochs: int
    batch: int


REGIMES = {"main": Regime(rows=2500, epochs=2, batch=32), "small": Regime(rows=500, epochs=6, batch=16)}


@dataclass(frozen=True)
class Cell:
    """A training of one task by one seed. Its name is all that is needed to make it again."""

    task: str
    training: str
    regime: str
    rate: float
    seed: int
    split: str
    """test: readouts are scored on the test rows. tuning: the principal ones on the validation rows."""

    @property
    def name(self) -> str:
        """All fields, such as ``trec/decayed/main/0.0001/1/test``."""
        return f"{self.task}/{self.training}/{self.regime}/{self.rate:g}/{self.seed}/{self.split}"

    @property
    def file(self) -> str:
        """Name of the file its rows go to."""
        return f"{self.split}-{self.regime}-{self.task}"

    @property
    def fingerprint(self) -> str:
        """Of the arithmetic that its numbers come from."""
        return fingerprint(self.training, _device().type, PRECISION)


def parse_cell(name: str) -> Cell:
    """Read a cell's name.

    Raises:
        ValueError: it is none.
    """
    parts = name.split("/")
    known = len(parts) == 6 and all(
        (
            parts[0] in TASKS,
            parts[1] in TRAININGS,
            parts[2] in REGIMES,
            re.fullmatch(r"[0-9.e-]+", parts[3]),
            parts[4].isdigit(),
            parts[5] in ("test", "tuning"),
        )
    )
    if not known:
        raise ValueError(f"{name!r} is no cell; expected task/training/regime/rate/seed/test, or .../tuning")
    return Cell(parts[0], parts[1], parts[2], float(parts[3]), int(parts[4]), parts[5])


def run_cell(cell: Cell) -> list[Row]:
    """Train, read out, score: a row a readout."""
    device, regime, training = _device(), REGIMES[cell.regime], TRAININGS[cell.training]
    _forget_peak(device)
    splits = load(cell.task, rows=regime.rows, seed=cell.seed)
    taught = time.process_time()
    teacher = _teach(cell, training, splits)
    taught = time.process_time() - taught
    model = pretrained(splits.num_labels, cell.seed, device)
    trained, steps = _fit(cell, training, splits, model, seed=cell.seed, averaged=True, teacher=teacher)
    try:
        scored = (
            _tuning(model, trained, training, splits, TASKS[cell.task].score)
            if cell.split == "tuning"
            else _test(model, trained, training, splits, TASKS[cell.task].score)
        )
    finally:
        if trained.averager is not None:
            trained.averager.close()
    shared = {
        "settings": {
            "rows": len(splits.train), "epochs": regime.epochs * training.length, "steps": steps,
            "batch": regime.batch,
            "precision": PRECISION, "max_length": MAX_LENGTH, "scored": len(_scored(cell, splits)),
        },
        "cost": {
            "units": training.units, "seconds": round(trained.seconds, 2),
            "cpu_seconds": round(trained.cpu_seconds + taught, 2), "peak_bytes": _peak(device),
        },
        "noise": {"divergence": trained.divergence, "noise_to_signal": trained.noise_to_signal},
    }  # fmt: skip
    return [{**identity(cell, name), "of": len(scored), **found, **shared} for name, found in scored.items()]


def identity(cell: Cell, readout: str) -> Row:
    """What says which row it is, where it comes from, and how to make it again."""
    return {
        "cell": cell.name, "task": cell.task, "arm": f"{cell.training}:{readout}", "training": cell.training,
        "readout": readout, "regime": cell.regime, "rate": cell.rate, "seed": cell.seed, "split": cell.split,
        "fingerprint": cell.fingerprint, "machine": machine(),
        "command": f"python -m benchmarks.study cell {cell.name}",
    }  # fmt: skip


def _fit(
    cell: Cell,
    training: Training,
    splits: Splits,
    model: nn.Module,
    *,
    seed: int,
    averaged: bool,
    teacher: Tensor | None = None,
) -> tuple[loop.Trained, int]:
    """Train a model in place; returns what it left behind, and its steps.

    Args:
        cell: for its budget and rate.
        training: what to do.
        splits: of the rows.
        model: as it begins.
        seed: of order, masks and noise.
        averaged: whether weights are averaged. For choosing a rate no more than that needs, since averages leave
            training as it is.
        teacher: logits (N, C) of the training rows, for a training that distils.
    """
    regime = REGIMES[cell.regime]
    places = [
        batch
        for epoch in range(regime.epochs * training.length)
        for batch in epoch_batches(splits.train, size=regime.batch, seed=seed, epoch=epoch)
    ]
    rules = rules_for(training, len(places)) if averaged else {}
    if cell.split == "tuning":
        rules = {name: rule for name, rule in rules.items() if name == training.principal}
    taught = {} if teacher is None else {TEACHER: teacher}
    batches = (
        splits.train.batch(batch) | {name: logits[batch] for name, logits in taught.items()}
        for batch in places
    )
    trained = loop.train(
        model, batches, objective=training.objective(seed), schedule=training.schedule, rate=cell.rate,
        total_steps=len(places), rules=rules, precision=PRECISION, seed=seed,
    )  # fmt: skip
    return trained, len(places)


def _teach(cell: Cell, training: Training, splits: Splits) -> Tensor | None:
    """Logits (N, C) that the teachers give to the training rows, of the mean of their probabilities; None without.

    Teachers are trained on the same rows, at the same rate; each has a head, an order and masks of its own.
    """
    chances = []
    for i, name in enumerate(training.teachers):
        seed = 1000 * (cell.seed + 1) + i
        teacher = pretrained(splits.num_labels, seed, _device())
        _fit(cell, TRAININGS[name], splits, teacher, seed=seed, averaged=False)
        chances.append(logits_of(teacher, splits.train).softmax(-1))
    return torch.stack(chances).mean(0).clamp(min=1e-12).log() if chances else None


def _scored(cell: Cell, splits: Splits) -> Rows:
    return splits.validation if cell.split == "tuning" else splits.test


def _tuning(model: nn.Module, trained: Any, training: Training, splits: Splits, score: str) -> dict[str, Row]:
    """Outcomes on the validation rows, of the readouts by which a rate may be chosen."""
    chosen = {"last", training.principal}
    found = {}
    for readout in readouts_for(training):
        if readout.name in chosen:
            with _in_place(model, trained.averager, readout):
                found[readout.name] = {"outcomes": _outcomes(model, splits.validation, score)}
    return found


def _test(model: nn.Module, trained: Any, training: Training, splits: Splits, score: str) -> dict[str, Row]:
    """Outcomes on the test rows of every readout, and of that which the validation rows choose."""
    found: dict[str, Row] = {}
    validation = {}
    for readout in readouts_for(training):
        with _in_place(model, trained.averager, readout):
            row: Row = {"outcomes": _outcomes(model, splits.test, score)}
            if readout.name in searched(training):
                validation[readout.name] = _outcomes(model, splits.validation, score)["nll"]
            if readout.rounded:
                row["rounded"] = {}
                for name, rounding in ROUNDINGS.items():
                    with changed(model, rounding):
                        row["rounded"][name] = _outcomes(model, splits.test, score)
        found[readout.name] = row
    best = min(validation, key=lambda name: validation[name])
    found["chosen"] = {"outcomes": found[best]["outcomes"], "chosen": best, "validation_nll": validation}
    return found


def _outcomes(model: nn.Module, rows: Rows, score: str) -> dict[str, float]:
    return outcomes(logits_of(model, rows), rows.labels, score)


@contextmanager
def _in_place(model: nn.Module, averager: Any, readout: Readout) -> Iterator[None]:
    """The model with the weights of a readout."""
    if readout.rule is None:
        yield
        return
    swapped = averager.swapped_in(readout.rule)
    if readout.blend == 1.0:
        with swapped:
            yield
        return
    average: dict[str, Tensor] = {}
    with swapped:
        average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with changed(model, lambda name, last: last + readout.blend * (average[name] - last)):
        yield


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """Most bytes held since the cell began: on the card, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
