"""Runs and traces that are small enough to add up by hand."""

from __future__ import annotations

from dataclasses import replace

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from swaft.training.planning.memory import PlannedRun
from swaft.training.planning.step import Activations, Weight

MATRIX = Weight(numel=100, rows=10, itemsize=4, group=0)
BIAS = Weight(numel=10, rows=10, itemsize=4, group=1)


def plain_run(
    *weights: Weight, world_size: int = 1, on_cpu: bool = True, peak: int = 0, blocks=None, **settings
) -> PlannedRun:
    """A run of which `peak` bytes are in use as its backward begins, and none as it ends."""
    weights = weights or (MATRIX, BIAS)
    weights = [
        replace(each, block=block) for each, block in zip(weights, blocks or [0] * len(weights), strict=True)
    ]
    activations = Activations(peak, late=0, kept=0)
    return PlannedRun(
        weights=weights, activations=activations, world_size=world_size, on_cpu=on_cpu, **settings
    )


def zero(**entries) -> DeepSpeedZeroConfig:
    """Section `zero_optimization` with these entries, as DeepSpeed reads it."""
    return DeepSpeedZeroConfig(**entries)


def phase_of(memory, name: str):
    """The phase of that name, device and host rows together."""
    (found,) = [phase for phase in memory.phases if phase.name == name]
    return {**found.device, **found.host}
