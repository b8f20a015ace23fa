"""Weight averaging: master shard -> host averages -> (swap-in | export)."""

from __future__ import annotations

from swaft.averaging import lora
from swaft.averaging.averager import WeightAverager
from swaft.averaging.engines import Engine, attach_engine
from swaft.averaging.export import save_pretrained
from swaft.averaging.rules import BEMA, EMA, LAWA, SWA, Merge, PowerEMA, Readout, Rule, Windows
from swaft.averaging.search import ReadoutSearch, Tried, search_windows

__all__ = [
    "BEMA",
    "EMA",
    "LAWA",
    "SWA",
    "Engine",
    "Merge",
    "PowerEMA",
    "Readout",
    "ReadoutSearch",
    "Rule",
    "Tried",
    "WeightAverager",
    "Windows",
    "attach_engine",
    "lora",
    "save_pretrained",
    "search_windows",
]
