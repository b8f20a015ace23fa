"""The noise-stability loss: cross entropy of a clean pass plus the symmetric KL to a noised one."""

from __future__ import annotations

from swaft.noise.loss.divergence import symmetric_kl
from swaft.noise.loss.options import Detach, Form, LossOptions, Reduction

__all__ = ["Detach", "Form", "LossOptions", "Reduction", "symmetric_kl"]
