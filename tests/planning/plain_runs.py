"""Runs and traces that are small enough to add up by hand."""

from __future__ import annotations

from swaft.planning.memory import Run, Weight
from swaft.planning.trace import Moment

MATRIX = Weight(numel=100, rows=10, itemsize=4, group=0)
BIAS = Weight(numel=10, rows=10, itemsize=4, group=1)


def plain_run(*weights: Weight, world_size: int = 1, on_cpu: bool = True, **settings) -> Run:
    return Run(weights=weights or (MATRIX, BIAS), world_size=world_size, on_cpu=on_cpu, **settings)


def steps_through(*uses: tuple[int, ...], peak: int = 0) -> list[Moment]:
    """Forward through modules with these parameters, and backward through them, gradients and all."""
    there = [Moment(kind, use, peak, peak) for use in uses for kind in ("enter", "leave")]
    back = [
        moment
        for use in reversed(uses)
        for moment in (
            Moment("enter", use, peak, peak),
            *(Moment("gradient", (number,), peak, peak) for number in reversed(use)),
            Moment("leave", use, peak, peak),
        )
    ]
    return [*there, Moment("turn", (), peak, peak), *back, Moment("end", (), peak, peak)]


def phase_of(memory, name: str):
    """The phase of that name, device and host rows together."""
    (found,) = [phase for phase in memory.phases if phase.name == name]
    return {**found.device, **found.host}
