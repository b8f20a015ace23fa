"""The losses as plain functions of tensors, named and shaped like torch.nn.functional."""

from __future__ import annotations

from swaft.noise.loss.divergence import symmetric_kl
from swaft.noise.loss.losses import (
    NoiseStabilityLoss,
    cross_entropy_symmetric_kl,
    linear_cross_entropy_symmetric_kl,
)

__all__ = [
    "NoiseStabilityLoss",
    "cross_entropy_symmetric_kl",
    "linear_cross_entropy_symmetric_kl",
    "symmetric_kl",
]
