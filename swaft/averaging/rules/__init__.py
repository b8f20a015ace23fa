"""Which optimizer steps enter an average, and with what weight: one rule a file, all of them pure arithmetic."""

from __future__ import annotations

from swaft.averaging.rules.base import Plan, Rule, Update, resolve_start
from swaft.averaging.rules.ema import EMA
from swaft.averaging.rules.swa import SWA

__all__ = ["EMA", "SWA", "Plan", "Rule", "Update", "resolve_start"]
