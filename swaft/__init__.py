"""swaft: fine-tuning that generalises better, by weight averaging and noise stability, at any scale.

Importing this package imports neither DeepSpeed nor Triton, scikit-learn or any tracker.
"""

from __future__ import annotations

from swaft.averaging import EMA, SWA, WeightAverager

__all__ = ["EMA", "SWA", "WeightAverager"]
