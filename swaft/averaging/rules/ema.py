"""The exponential moving average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Literal

from swaft.averaging.rules.base import RunningMeanPlan, spaced
from swaft.errors import ConfigError
from swaft.fraction import share_of
from swaft.options import Count, Range, StepOrShare

Warmup = Literal["none", "ramp", "debias"]

DEFAULT_DECAY = 0.999


@dataclass(frozen=True, kw_only=True)
class EMAPlan(RunningMeanPlan):
    """Weight ``1 - decay`` for every member after the first, or more while the average is young."""

    decay: float
    """Share of the old mean that each event keeps."""
    warmup: Warmup
    """What is different while the average is young."""

    def weight(self, n: int) -> float:
        """``1 - decay``, more under a warm-up."""
        if self.warmup == "ramp":
            return 1.0 - min(self.decay, (1 + n) / (10 + n))
        if self.warmup == "debias":
            # 1 - decay^(n + 1), without losing the digits of a decay next to 1.
            return (1.0 - self.decay) / -math.expm1((n + 1) * math.log(self.decay))
        return 1.0 - self.decay


@dataclass(frozen=True)
class EMA:
    """Exponential moving average: ``mean <- decay * mean + (1 - decay) * weights``, begun at the first member."""

    decay: Annotated[float, Range(above=0, below=1)] | None = None
    """Share of the old mean that each event keeps. None: as `half_life` says; 0.999 where that is None too."""
    start: StepOrShare = 0
    """First member. A float is a fraction of the run, an int a step; 0 is the weights before training."""
    every: Count = 1
    """Optimizer steps between two members."""
    half_life: Annotated[float, Range(above=0, high=1)] | Count | None = None
    """In place of `decay`: the time after which a member counts half as much. A float is a fraction of the run,
    an int optimizer steps; each event then keeps ``0.5 ** (every / steps)``."""
    warmup: Warmup = "none"
    """How a young average forgets where it began. ``none``: the first member keeps the share ``decay ** n``.
    ``ramp``: the decay is at most ``(1 + n)/(10 + n)`` at member ``n`` from 0, as in TensorFlow's
    ExponentialMovingAverage. ``debias``: weights ``(1 - decay)/(1 - decay ** (n + 1))``, which is Adam's bias
    correction (Kingma & Ba 2015, section 3): the sum that begins at zero, divided by ``1 - decay ** (n + 1)``."""

    def __post_init__(self) -> None:
        if self.decay is None and self.half_life is None:
            object.__setattr__(self, "decay", DEFAULT_DECAY)  # so that the repr says it

    def plan(self, total_steps: int) -> EMAPlan:
        """The events of a run, see `Rule.plan`; `decay` and `half_life` exclude each other."""
        return EMAPlan(**spaced(self, total_steps), decay=self._decay(total_steps), warmup=self.warmup)

    def _decay(self, total_steps: int) -> float:
        half_life = self.half_life
        if half_life is None:
            return float(self.decay)  # type: ignore[arg-type]  # one of the two is there
        if self.decay is not None:
            raise ConfigError(
                f"decay is {self.decay} and half_life is {half_life}; expected one of the two, since each gives "
                "the other"
            )
        steps = float(half_life if isinstance(half_life, Integral) else share_of(total_steps, half_life))
        decay = 0.5 ** (self.every / steps)
        if not 0.0 < decay < 1.0:
            raise ConfigError(
                f"half_life={half_life} with every={self.every} keeps the share {decay} of the old mean at each "
                "event, expected one strictly between 0 and 1"
            )
        return decay
