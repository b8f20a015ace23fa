"""Weight averaging: master shard -> host averages -> (swap-in | export)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swaft.averaging.averager import WeightAverager
from swaft.averaging.engines import Engine, attach_engine
from swaft.averaging.export import save_pretrained
from swaft.averaging.rules import BEMA, EMA, LAWA, SWA, Merge, PowerEMA, Readout, Rule, Windows

if TYPE_CHECKING:
    from swaft.averaging import lora
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


def __getattr__(name: str) -> Any:
    """Import `lora` and the search on first use: most runs need neither."""
    if name not in __all__:
        raise AttributeError(f"module 'swaft.averaging' has no attribute {name!r}")
    if name == "lora":
        return import_module(f"{__name__}.lora")
    return getattr(import_module(f"{__name__}.search"), name)
