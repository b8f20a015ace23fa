"""The noise-stability loss: cross entropy of a clean pass plus the symmetric KL to a noised one."""

from __future__ import annotations

from swaft.noise.loss.divergence import Detach, symmetric_kl

__all__ = ["Detach", "symmetric_kl"]
