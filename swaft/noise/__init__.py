"""Noise stability: objectives that require the same output when the embeddings are perturbed."""

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
