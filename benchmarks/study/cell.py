"""One cell: one task, training and seed, and everything measured on it."""

from __future__ import annotations

import gc
import re
import resource
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from benchmarks.measuring import forget_peak, memory_of
from benchmarks.study import collapse, flatness
from benchmarks.study.fitting import REGIMES, device, fit, teach
from benchmarks.study.numerics import PRECISION, fingerprint, machine
from benchmarks.study.pack import model_name, packed
from benchmarks.study.reading import score_test, score_validation
from benchmarks.study.readouts import RECOMMENDED
from benchmarks.study.store import Row
from benchmarks.study.tasks import TASKS, load, new_model
from benchmarks.study.trainings import TRAININGS

READINGS = {
    "test": score_test,
    "tuning": score_validation,
    "probe": collapse.probe_others,
    "flatness": flatness.measure,
}
"""What is measured on a trained model, by split."""
CYCLE = "cycle"
"""The split for chains of tasks: trains several models, and measures in between."""


@dataclass(frozen=True)
class Cell:
    """One task, training and seed. Its name is all that is needed to run it again."""

    task: str
    training: str
    regime: str
    rate: float
    seed: int
    split: str
    """What is measured: test (every readout on the test rows), tuning (the principal ones on the validation rows),
    probe, flatness or cycle."""

    @property
    def name(self) -> str:
        """All fields, such as ``trec/decayed/main/0.0001/1/test``."""
        return f"{self.task}/{self.training}/{self.regime}/{self.rate:g}/{self.seed}/{self.split}"

    @property
    def file(self) -> str:
        """Name of the file that its rows go to."""
        return f"{self.split}-{self.regime}-{self.task}"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the arithmetic that its numbers come from."""
        return fingerprint(self.training, device().type, PRECISION)


def parse_cell(name: str) -> Cell:
    """Read a cell's name.

    Raises:
        ValueError: it is not a cell.
    """
    parts, splits = name.split("/"), (*READINGS, CYCLE)
    known = len(parts) == 6 and all(
        (
            parts[0] in TASKS,
            parts[1] in TRAININGS,
            parts[2] in REGIMES,
            re.fullmatch(r"[0-9.e-]+", parts[3]),
            parts[4].isdigit(),
            parts[5] in splits,
        )
    )
    if not known:
        raise ValueError(
            f"{name!r} is not a cell; expected task/training/regime/rate/seed/split, the split one of "
            f"{', '.join(splits)}"
        )
    return Cell(parts[0], parts[1], parts[2], float(parts[3]), int(parts[4]), parts[5])


def run_cell(cell: Cell) -> list[Row]:
    """Train and score the readouts: one row each."""
    _forget_peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    found, settings = _cycle(cell) if cell.split == CYCLE else _measure(cell)
    cost = {
        "units": TRAININGS[cell.training].units,
        "all_seconds": round(time.perf_counter() - began, 2),
        "all_cpu_seconds": round(time.process_time() - cpu_began, 2),
        "peak_bytes": _peak(),
    }
    settings |= {"model": model_name()}
    rows = []
    for name, row in found.items():
        own = row.pop("cost", {})
        rows.append(
            {**identity(cell, name), "of": len(found), **row, "settings": settings, "cost": cost | own}
        )
    return rows


def _measure(cell: Cell) -> tuple[dict[str, Row], Row]:
    """Train once and measure; returns rows by readout, and settings."""
    task, training = TASKS[cell.task], TRAININGS[cell.training]
    regime = REGIMES[cell.regime].times(task.length)
    options = {"regime": regime, "rate": cell.rate, "seed": cell.seed}
    splits = load(cell.task, rows=regime.rows * task.rows, seed=cell.seed)
    began = time.process_time()
    teacher = teach(splits, training, task=cell.task, regime=regime, seed=cell.seed)
    taught = time.process_time() - began
    model = new_model(task, splits, cell.seed, device())
    averaged = {"tuning": (training.principal,), "probe": (RECOMMENDED,)}.get(cell.split)
    trained = fit(model, splits, training, averaged=averaged, teacher=teacher, **options)
    try:
        found = READINGS[cell.split](model, trained, training, splits, task)
    finally:
        if trained.averager is not None:
            trained.averager.close()
    for row in found.values():
        row["cost"] = {
            "seconds": round(trained.seconds, 2),
            "cpu_seconds": round(trained.cpu_seconds + taught, 2),
        }
        row["noise"] = {"divergence": trained.divergence, "noise_to_signal": trained.noise_to_signal}
    scored = splits.validation if cell.split == "tuning" else splits.test
    return found, {
        "rows": len(splits.train), "epochs": regime.epochs * training.length, "steps": trained.steps,
        "batch": regime.batch, "scored": len(scored),
        "longest": max(map(len, splits.train.ids)),
    }  # fmt: skip


def _cycle(cell: Cell) -> tuple[dict[str, Row], Row]:
    """Train along the chain of tasks that starts with the cell's; returns rows by stage, and settings."""
    regime = REGIMES[cell.regime]
    found = collapse.cycle(cell.task, TRAININGS[cell.training], regime=regime, rate=cell.rate, seed=cell.seed)
    return found, {"rows": regime.rows, "epochs": regime.epochs, "batch": regime.batch}


def identity(cell: Cell, readout: str) -> Row:
    """Fields that say which row it is, where it comes from, and how to reproduce it."""
    pack = f"SWAFT_STUDY_PACK={shlex.quote(str(packed()))} " if packed() else ""
    return {
        "cell": cell.name, "task": cell.task, "arm": f"{cell.training}:{readout}", "training": cell.training,
        "readout": readout, "regime": cell.regime, "rate": cell.rate, "seed": cell.seed, "split": cell.split,
        "fingerprint": cell.fingerprint, "machine": machine(),
        "command": f"{pack}SWAFT_STUDY_PRECISION={PRECISION} python -m benchmarks.study cell {cell.name}",
    }  # fmt: skip


def _forget_peak() -> None:
    gc.collect()  # the previous cell lingers in reference cycles, and would count
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            forget_peak()


def _peak() -> int:
    """Peak bytes since the cell started: on the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, KeyError):
        return memory_of("VmHWM")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
