"""The exponential moving average."""

from __future__ import annotations

from dataclasses import dataclass

from swaft.averaging.rules.base import RunningMeanPlan, checked, resolve_start
from swaft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EMAPlan(RunningMeanPlan):
    """Weight ``1 - decay`` for every member after the first."""

    decay: float
    """Share of the old mean that each event keeps."""

    def weight(self, n: int) -> float:
        """``1 - decay``."""
        return 1.0 - self.decay


@dataclass(frozen=True)
class EMA:
    """Exponential moving average: ``mean <- decay * mean + (1 - decay) * weights``, begun at the first member."""

    decay: float = 0.999
    """Share of the old mean that each event keeps, strictly between 0 and 1."""
    start: float | int = 0
    """First member. A float is a fraction of the run, an int a step; 0 is the weights before training."""
    every: int = 1
    """Optimizer steps between two members."""

    def plan(self, total_steps: int) -> EMAPlan:
        """The events of a run of ``total_steps`` optimizer steps.

        Raises:
            ConfigError: decay, start or interval is out of range, or fewer than two weights would be averaged.
        """
        if not 0.0 < self.decay < 1.0:
            raise ConfigError(
                f"averaging.decay is {self.decay}, expected a number strictly between 0 and 1 (0.999, say)"
            )
        first = resolve_start(self.start, total_steps)
        plan = EMAPlan(first_step=first, every=self.every, total_steps=total_steps, decay=self.decay)
        return checked(plan, start=self.start)
