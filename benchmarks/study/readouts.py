"""The weights read out of one training: the last ones, averages, and blends of the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import swaft
from benchmarks.study.trainings import Training

MEMBERS = 80
"""Approximate number of members of an average over the whole run: as good as all steps, and faster."""
BLENDED = "tail-0.2"
RECOMMENDED = "ema-0.1"
"""The average recommended for constant runs, which stands for them in the measurements beyond scores."""
ROUNDED = ("tail-0.1", "swa-0.5", "ema-0.1")
"""The averages that are also scored with rounded weights, and by the texts they generate."""


@dataclass(frozen=True)
class Readout:
    """``last + blend * (average - last)`` for one training."""

    name: str
    rule: str | None = None
    """Name of the average; None: the last weights."""
    blend: float = 1.0
    rounded: bool = False
    """Whether it is also scored with rounded weights, and by the texts it generates."""


def rules_for(training: Training, total_steps: int) -> dict[str, Any]:
    """The rules that all averages of a training are read from, by name; they share one copy of the weights.

    Args:
        training: determines which.
        total_steps: optimizer steps of the run.
    """
    every = max(1, total_steps // MEMBERS)

    def swa(start: float) -> Any:
        return swaft.SWA(start=start, every=every)

    def tail(share: float) -> Any:
        return swaft.SWA(start=1.0 - share, every=1)

    if training.schedule == "decayed":
        rules = {"tail-0.1": tail(0.1), "tail-0.2": tail(0.2)}
        if training.plain:
            rules |= {"tail-0.05": tail(0.05), "swa-0.5": swa(0.5)}
            rules |= {"ema-0.05": swaft.EMA(half_life=0.05, every=every)}
        return rules
    rules = {"swa-0.5": swa(0.5), "swa-0.75": swa(0.75), "ema-0.1": swaft.EMA(half_life=0.1, every=every)}
    if training.plain:
        rules |= {
            "swa-0.25": swa(0.25),
            "ema-0.05": swaft.EMA(half_life=0.05, every=every),
            "ema-0.2": swaft.EMA(half_life=0.2, every=every),
            "lawa": swaft.LAWA(last=5, every=max(1, total_steps // 20)),
            "power-ema": swaft.PowerEMA(sigma_rel=(0.1,), every=every, snapshots=1),
            "bema": swaft.BEMA(every=every),
            "merge": swaft.Merge("1-sqrt", start=0.5, every=every),
        }
    return rules


def readouts_for(training: Training) -> list[Readout]:
    """The readouts of a training, the last weights first."""
    decayed = training.schedule == "decayed"
    found = [Readout("last", rounded=True)]
    found += [Readout(name, name, rounded=name in ROUNDED) for name in rules_for(training, 1000)]
    if decayed:
        blends = (-0.3, 0.3, 0.6, 1.5) if training.plain else (1.5,)
        found += [Readout(f"blend{blend:+g}", BLENDED, blend) for blend in blends]
    return found


def searched(training: Training) -> tuple[str, ...]:
    """The readouts from which the validation rows choose one, reported as the readout `chosen`."""
    if training.schedule == "decayed":
        return ("last", "tail-0.1", "tail-0.2") + (("swa-0.5",) if training.plain else ())
    return ("last", "swa-0.5", "swa-0.75") + (("swa-0.25",) if training.plain else ())
