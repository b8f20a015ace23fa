"""Runs and traces that are small enough to add up by hand."""

from __future__ import annotations

from swaft.training.planning.memory import PlannedRun
from swaft.training.planning.step import Moment, TracedStep, Weight

MATRIX = Weight(numel=100, rows=10, itemsize=4, group=0)
BIAS = Weight(numel=10, rows=10, itemsize=4, group=1)


def plain_run(
    *weights: Weight, world_size: int = 1, on_cpu: bool = True, peak: int = 0, blocks=None, **settings
) -> PlannedRun:
    """A run whose backward gives the last weight's gradient first; `peak` bytes are in use at every moment."""
    weights = weights or (MATRIX, BIAS)
    trained = [number for number, weight in enumerate(weights) if weight.group is not None]
    gradients = [Moment(peak, peak, number) for number in reversed(trained)]
    moments = [Moment(peak, peak), *gradients, Moment(peak, 0)]
    step = TracedStep(weights, moments, blocks or [0] * len(weights))
    return PlannedRun(step=step, world_size=world_size, on_cpu=on_cpu, **settings)


def phase_of(memory, name: str):
    """The phase of that name, device and host rows together."""
    (found,) = [phase for phase in memory.phases if phase.name == name]
    return {**found.device, **found.host}
