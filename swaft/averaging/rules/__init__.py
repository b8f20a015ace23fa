"""Which optimizer steps enter an average, and with what weight: pure arithmetic."""

from __future__ import annotations

from swaft.averaging.rules.base import Plan, Readout, Rule
from swaft.averaging.rules.means import BEMA, EMA, LAWA, SWA, Merge
from swaft.averaging.rules.power_ema import PowerEMA
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
"""Every rule, by its name in configurations."""
RECOMMENDED = EMA()
"""The rule that docs/evidence.md recommends, for a run with a constant learning rate."""


def rule_name(plan: Plan) -> str:
    """The name in configurations of the rule that a plan was made from; of another rule, the name of its class."""
    kind = type(plan if plan.rule is None else plan.rule)
    return next((name for name, known in RULES.items() if known is kind), kind.__name__)


__all__ = [
    "BEMA",
    "EMA",
    "LAWA",
    "RECOMMENDED",
    "RULES",
    "SWA",
    "Merge",
    "Plan",
    "PowerEMA",
    "Readout",
    "Rule",
    "Windows",
    "WindowsPlan",
    "rule_name",
]
