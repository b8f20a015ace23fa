"""swaft: fine-tuning that generalises better, by weight averaging and noise stability, at any scale.

Importing this package imports neither DeepSpeed nor Triton, scikit-learn or any tracker.
"""

from __future__ import annotations

from swaft import functional
from swaft.averaging import EMA, SWA, WeightAverager
from swaft.noise import R3F, R4F, RDrop, TaskLoss

__all__ = ["EMA", "R3F", "R4F", "SWA", "RDrop", "TaskLoss", "WeightAverager", "functional"]
