"""Noise stability: objectives that ask for the same answer when the embeddings are disturbed."""

from __future__ import annotations

from swaft.noise.divergence import symmetric_kl
from swaft.noise.objectives import R3F, R4F, ObjectiveOutput, RDrop, TaskLoss
from swaft.noise.presets import PRESETS, NoiseSettings
from swaft.noise.spectral import fold_spectral_norm

__all__ = [
    "PRESETS",
    "R3F",
    "R4F",
    "NoiseSettings",
    "ObjectiveOutput",
    "RDrop",
    "TaskLoss",
    "fold_spectral_norm",
    "symmetric_kl",
]
