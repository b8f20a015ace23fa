"""The exponential moving average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from swaft.averaging.rules.base import RunningMeanPlan, checked, require_whole, resolve_start
from swaft.errors import ConfigError
from swaft.fraction import share_of

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

    decay: float | None = None
    """Share of the old mean that each event keeps, strictly between 0 and 1. None: as `half_life` says; 0.999
    where that is None too."""
    start: float | int = 0
    """First member. A float is a fraction of the run, an int a step; 0 is the weights before training."""
    every: int = 1
    """Optimizer steps between two members."""
    half_life: float | int | None = None
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
        """The events of a run of ``total_steps`` optimizer steps.

        Raises:
            ConfigError: an option is out of range, or fewer than two weights would be averaged.
        """
        if self.warmup not in get_args(Warmup):
            raise ConfigError(
                f"averaging.warmup is {self.warmup!r}, expected one of {', '.join(get_args(Warmup))}"
            )
        plan = EMAPlan(
            first_step=resolve_start(self.start, total_steps),
            every=self.every,
            total_steps=total_steps,
            decay=self._decay(total_steps),
            warmup=self.warmup,
        )
        return checked(plan, start=self.start)

    def _decay(self, total_steps: int) -> float:
        if self.half_life is None:
            if not isinstance(self.decay, Real) or not 0.0 < self.decay < 1.0:
                raise ConfigError(
                    f"averaging.decay is {self.decay!r}, expected a number strictly between 0 and 1 (0.999, say)"
                )
            return float(self.decay)
        if self.decay is not None:
            raise ConfigError(
                f"averaging.decay is {self.decay} and averaging.half_life is {self.half_life}; expected one of "
                "the two, since each gives the other"
            )
        require_whole("every", self.every, at_least=1)
        steps = self._half_life_steps(total_steps)
        decay = 0.5 ** (self.every / steps)
        if not 0.0 < decay < 1.0:
            raise ConfigError(
                f"averaging.half_life of {steps:g} steps with averaging.every={self.every} makes a decay of "
                f"{decay}, expected one strictly between 0 and 1"
            )
        return decay

    def _half_life_steps(self, total_steps: int) -> float:
        half_life = self.half_life
        if not isinstance(half_life, Real) or isinstance(half_life, bool):
            raise ConfigError(
                f"averaging.half_life is {half_life!r}, expected a fraction of the run (0.1) or steps (100)"
            )
        if isinstance(half_life, Integral):
            if half_life < 1:
                raise ConfigError(f"averaging.half_life is {half_life} steps, expected at least 1")
            return float(half_life)
        if not 0.0 < half_life <= 1.0:
            raise ConfigError(
                f"averaging.half_life is the fraction {half_life}, expected one above 0.0 and up to 1.0; write "
                "an integer to name a number of steps"
            )
        # A run of no steps is refused for its lack of members.
        return float(share_of(max(1, total_steps), half_life))
