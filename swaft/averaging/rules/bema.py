"""The bias-corrected exponential moving average."""

from __future__ import annotations

from dataclasses import dataclass

from swaft.averaging.rules.base import DEFAULT, Plan, Readout, Update, spaced
from swaft.options import Count, NotNegative, StepOrShare

EMA_LANE, ANCHOR_LANE, LAST_LANE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class BEMAPlan(Plan):
    """A running mean, the first member and the latest."""

    ema_power: float
    """``kappa``."""
    bias_power: float
    """``eta``."""
    lag: int
    """``rho``."""
    multiplier: float
    """``gamma``."""

    @property
    def lanes(self) -> tuple[bool, ...]:
        """The running mean, and copies of the first and the latest member."""
        return (True, False, False)

    def beta(self, n: int) -> float:
        """Share of member ``n`` in the running mean."""
        return self._age(n) ** -self.ema_power

    def alpha(self, n: int) -> float:
        """Factor of the correction once member ``n`` is in."""
        return self._age(n) ** -self.bias_power

    def updates(self, n: int) -> tuple[Update, ...]:
        """The member moves the mean and becomes the latest; the first one begins all three."""
        if n == 0:
            return (Update(EMA_LANE, 1.0), Update(ANCHOR_LANE, 1.0), Update(LAST_LANE, 1.0))
        return (Update(EMA_LANE, self.beta(n)), Update(LAST_LANE, 1.0))

    def readout(self, num_members: int, chosen: Readout = DEFAULT) -> dict[int, float]:
        """``mean + alpha * (latest - first)``."""
        chosen.refuse_all_but()
        alpha = self.alpha(num_members - 1)
        return {EMA_LANE: 1.0, LAST_LANE: alpha, ANCHOR_LANE: -alpha}

    def _age(self, n: int) -> float:
        return self.lag + self.multiplier * self.step_of(n)


@dataclass(frozen=True)
class BEMA:
    """Bias-corrected exponential moving average: an EMA, pushed on by what training has moved since its start.

    Block & Zhang 2025, "EMA Without the Lag" (arXiv 2508.00180), algorithm 1: at step ``t``

        beta = (rho + gamma t) ** -kappa             mean <- (1 - beta) mean + beta theta_t
        alpha = (rho + gamma t) ** -eta              average = mean + alpha (theta_t - theta_0)

    every ``phi`` steps after a burn-in of ``tau``, at whose end ``mean = theta_0 = theta_tau``. The defaults are
    the authors' and TRL's. TRL's BEMACallback computes these formulas, with ``t`` counted from the start of
    training, as here. The authors' code (abblock/bema) has ``1 + t - tau + rho`` in place of ``rho + gamma t``,
    one step more where ``tau = 0``, and a floor of 1e-4 under ``beta``, reached after a hundred million steps.
    """

    ema_power: NotNegative = 0.5
    """How fast the average slows down, ``kappa`` of the paper; 0 makes the mean the latest weights."""
    bias_power: NotNegative = 0.2
    """How fast the correction fades, ``eta``: 0 keeps it whole for good; the larger, the sooner it is gone."""
    lag: Count = 10
    """How many steps old the run counts as when it begins, ``rho``."""
    multiplier: NotNegative = 1.0
    """What a step adds to the age of the run, ``gamma``."""
    start: StepOrShare = 0
    """First member, ``theta_0`` (``tau``). A float is a fraction of the run, an int a step; 0 is the weights before
    training."""
    every: Count = 400
    """Optimizer steps between two members (``phi``). The mean remembers some ``sqrt(t)`` members, so this
    decides how far back it reaches."""

    def plan(self, total_steps: int) -> BEMAPlan:
        """The events of a run, see `Rule.plan`."""
        return BEMAPlan(
            **spaced(self, total_steps),
            ema_power=self.ema_power,
            bias_power=self.bias_power,
            lag=self.lag,
            multiplier=self.multiplier,
        )
