"""Which optimizer steps enter an average, and with what weight. All of it is pure arithmetic."""

from __future__ import annotations

from swaft.averaging.rules.base import (
    DEFAULT,
    Blend,
    Plan,
    Precision,
    Readout,
    Rule,
    Update,
    plan_all,
    resolve_start,
)
from swaft.averaging.rules.means import BEMA, EMA, LAWA, SWA, Merge
from swaft.averaging.rules.power_ema import PowerEMA, PowerEMAPlan
from swaft.averaging.rules.windows import Windows, WindowsPlan

RULES = {
    "swa": SWA,
    "ema": EMA,
    "lawa": LAWA,
    "merge": Merge,
    "bema": BEMA,
    "power_ema": PowerEMA,
    "windows": Windows,
}
"""Every rule by the name it has in configurations."""

__all__ = [
    "BEMA",
    "DEFAULT",
    "EMA",
    "LAWA",
    "RULES",
    "SWA",
    "Blend",
    "Merge",
    "Plan",
    "PowerEMA",
    "PowerEMAPlan",
    "Precision",
    "Readout",
    "Rule",
    "Update",
    "Windows",
    "WindowsPlan",
    "plan_all",
    "resolve_start",
]
