"""Noise stability: objectives that ask for the same answer when the embeddings are disturbed."""

from __future__ import annotations

from swaft.noise.loss import symmetric_kl
from swaft.noise.objectives import R3F, R4F, ObjectiveOutput, RDrop, TaskLoss
from swaft.noise.presets import PRESETS, NoiseSettings

__all__ = [
    "PRESETS",
    "R3F",
    "R4F",
    "NoiseSettings",
    "ObjectiveOutput",
    "RDrop",
    "TaskLoss",
    "symmetric_kl",
]
