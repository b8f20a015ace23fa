"""Weight averaging: master shard -> host average -> (swap-in | export)."""

from __future__ import annotations

from swaft.averaging.averager import WeightAverager
from swaft.averaging.engines import Engine, attach_engine
from swaft.averaging.export import save_pretrained
from swaft.averaging.rules import EMA, SWA, Rule

__all__ = ["EMA", "SWA", "Engine", "Rule", "WeightAverager", "attach_engine", "save_pretrained"]
