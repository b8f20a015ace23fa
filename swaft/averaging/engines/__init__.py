"""One adapter an engine: where its fp32 master weights live, and how forwards see a change of them."""

from __future__ import annotations

from swaft.averaging.engines.attach import attach_engine
from swaft.averaging.engines.base import Engine

__all__ = ["Engine", "attach_engine"]
