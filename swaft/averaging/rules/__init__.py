"""Which optimizer steps enter an average, and with what weight: one rule a file, all of them pure arithmetic."""

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
from swaft.averaging.rules.bema import BEMA
from swaft.averaging.rules.ema import EMA
from swaft.averaging.rules.lawa import LAWA
from swaft.averaging.rules.merge import Merge
from swaft.averaging.rules.power_ema import PowerEMA, PowerEMAPlan
from swaft.averaging.rules.swa import SWA
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
