"""Runs and traces that are small enough to add up by hand."""

from __future__ import annotations

from dataclasses import replace

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from swaft.training.planning.memory import PlannedRun, phases_of
from swaft.training.planning.step import Weight

MATRIX = Weight(numel=100, rows=10, itemsize=4)
BIAS = Weight(numel=10, rows=10, itemsize=4)


def plain_run(
    *weights: Weight, world_size: int = 1, on_cpu: bool = True, blocks=None, **settings
) -> PlannedRun:
    weights = weights or (MATRIX, BIAS)
    weights = [
        replace(each, block=block) for each, block in zip(weights, blocks or [0] * len(weights), strict=True)
    ]
    return PlannedRun(weights, world_size=world_size, on_cpu=on_cpu, **settings)


def zero(**entries) -> DeepSpeedZeroConfig:
    """Section `zero_optimization` with these entries, as DeepSpeed reads it."""
    return DeepSpeedZeroConfig(**entries)


def phases(memory, *, peak: int = 0):
    """The phases of a run of which `peak` bytes are in use as its backward begins."""
    rows, _ = memory
    return {phase.name: phase for phase in phases_of(rows, peak)}


def phase_of(memory, name: str, *, peak: int = 0):
    """The phase of that name, device and host rows together."""
    found = phases(memory, peak=peak)[name]
    return {**found.device, **found.host}
