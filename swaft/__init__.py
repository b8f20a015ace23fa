"""swaft: fine-tuning that generalises better, by weight averaging and noise stability, at any scale.

Importing this package imports neither DeepSpeed nor Triton, scikit-learn or any tracker.
"""

from __future__ import annotations

from swaft import functional
from swaft.averaging import BEMA, EMA, LAWA, SWA, Merge, PowerEMA, WeightAverager, Windows, search_windows
from swaft.noise import R3F, R4F, RDrop, TaskLoss

__all__ = [
    "BEMA",
    "EMA",
    "LAWA",
    "R3F",
    "R4F",
    "SWA",
    "Merge",
    "PowerEMA",
    "RDrop",
    "TaskLoss",
    "WeightAverager",
    "Windows",
    "functional",
    "search_windows",
]
