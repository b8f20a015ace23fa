"""swaft: fine-tuning that generalises better, by weight averaging and noise stability, at any scale.

Importing this package imports nothing else: names are loaded on first use, so that `swaft --help` does not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swaft import averaging, errors, functional, noise, soup
    from swaft.averaging import (
        BEMA,
        EMA,
        LAWA,
        SWA,
        Merge,
        PowerEMA,
        Readout,
        WeightAverager,
        Windows,
        search_windows,
    )
    from swaft.integrations.accelerate import register_averager
    from swaft.integrations.transformers import NoiseCallback, WeightAveragingCallback, averaged_weights
    from swaft.noise import R3F, R4F, RDrop, TaskLoss

__all__ = [
    "BEMA",
    "EMA",
    "LAWA",
    "R3F",
    "R4F",
    "SWA",
    "Merge",
    "NoiseCallback",
    "PowerEMA",
    "RDrop",
    "Readout",
    "TaskLoss",
    "WeightAverager",
    "WeightAveragingCallback",
    "Windows",
    "averaged_weights",
    "averaging",
    "errors",
    "functional",
    "noise",
    "register_averager",
    "search_windows",
    "soup",
]

_MODULES = ("averaging", "errors", "functional", "noise", "soup")
_ELSEWHERE = {
    **dict.fromkeys(("R3F", "R4F", "RDrop", "TaskLoss"), "noise"),
    **dict.fromkeys(
        ("NoiseCallback", "WeightAveragingCallback", "averaged_weights"), "integrations.transformers"
    ),
    "register_averager": "integrations.accelerate",
}
"""The modules of the names that are not from `swaft.averaging`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'swaft' has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f"swaft.{name}")
    return getattr(import_module(f"swaft.{_ELSEWHERE.get(name, 'averaging')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
