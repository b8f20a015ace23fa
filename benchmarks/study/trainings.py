"""The trainings: what each minimises, with which schedule, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import swaft
from benchmarks.study.rivals import Distillation, FreeLB, Smart


@dataclass(frozen=True)
class Training:
    """One way to train."""

    name: str
    schedule: str
    """decayed: warmup, then linearly to 0. constant: warmup, then constant."""
    objective: Callable[[int], Any] = lambda seed: swaft.TaskLoss()
    """Makes the objective of a run from its seed."""
    passes: int = 1
    """Forward and backward passes over a batch, per step."""
    length: int = 1
    """Epochs, as a multiple of the regime's."""
    principal: str = "last"
    """The readout by which its learning rate is chosen."""
    teachers: tuple[str, ...] = ()
    """Trainings, each with its own seed, whose mean probabilities are the teacher's."""
    plain: bool = False
    """Whether all readouts are taken from it, not only the main ones."""

    @property
    def units(self) -> int:
        """Forward-backward passes over the training rows, as a multiple of the baseline's."""
        return self.passes * self.length + sum(TRAININGS[teacher].units for teacher in self.teachers)


def _r3f(**options: Any) -> Callable[[int], Any]:
    return lambda seed: swaft.R3F(seed=seed, **options)


def _rdrop(seed: int) -> Any:
    return swaft.RDrop(weight=1.0, passes="doubled", seed=seed)


_OBJECTIVES: dict[str, Callable[[int], Any]] = {
    "rdrop": _rdrop,
    # What the released code did where its noise took effect: small noise, other dropout masks in the noised pass.
    "r3f-independent": _r3f(weight=1.0, sigma=1e-5, masks="independent", passes="doubled"),
    "r3f-relative-0.3": _r3f(weight=1.0, sigma=0.3, preset="relative"),
    "r3f-relative-0.1": _r3f(weight=1.0, sigma=0.1, preset="relative"),
    "r3f-relative-1.0": _r3f(weight=1.0, sigma=1.0, preset="relative"),
    "r3f-relative-0.1-w5": _r3f(weight=5.0, sigma=0.1, preset="relative"),
    "r3f-relative-0.3-w5": _r3f(weight=5.0, sigma=0.3, preset="relative"),
    "r3f-relative-1.0-w5": _r3f(weight=5.0, sigma=1.0, preset="relative"),
    "r3f-literal": _r3f(weight=1.0, sigma=1e-5, preset="paper"),
    "r4f-literal": lambda seed: swaft.R4F(weight=1.0, sigma=1e-5, preset="paper", seed=seed),
    "r4f-relative-1.0": lambda seed: swaft.R4F(weight=1.0, sigma=1.0, preset="relative", seed=seed),
}

TRAININGS = {
    training.name: training
    for training in (
        Training("decayed", "decayed", plain=True),
        Training("constant", "constant", principal="swa-0.5", plain=True),
        Training("decayed2x", "decayed", length=2, plain=True),
        Training("constant2x", "constant", length=2, principal="swa-0.5", plain=True),
        *(
            Training(f"{name}-{schedule}", schedule, objective, 2, principal=principal)
            for name, objective in _OBJECTIVES.items()
            for schedule, principal in (("decayed", "last"), ("constant", "swa-0.5"))
        ),
        Training("smart-decayed", "decayed", lambda seed: Smart(), passes=3),
        Training("freelb-decayed", "decayed", lambda seed: FreeLB(), passes=2),
        Training("distilled-longer", "decayed", lambda seed: Distillation(), teachers=("decayed2x",)),
        Training("distilled-ensemble", "decayed", lambda seed: Distillation(), teachers=("decayed",) * 3),
    )
}
TEACHER_RATES = {
    "decayed": {"sst2": 1e-4, "trec": 4e-4, "cr": 5e-5, "banking77": 4e-4},
    "decayed2x": {"sst2": 2.5e-5, "trec": 1e-4, "cr": 2.5e-5, "banking77": 4e-4},
}
"""The rates that tuning chose, by teacher and task; copied here, so that a cell's name still says all about it."""
BASELINE = "decayed"
"""The training that all others are compared with, or with a run of it twice as long."""
BASELINES = {1: "decayed:last", **dict.fromkeys((2, 3, 4), "decayed2x:last")}
"""The baseline for an arm, by its units: the one of equal cost, or the most expensive there is."""
