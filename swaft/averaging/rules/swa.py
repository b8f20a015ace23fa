"""Stochastic weight averaging: the plain mean."""

from __future__ import annotations

from dataclasses import dataclass

from swaft.averaging.rules.base import RunningMeanPlan, spaced
from swaft.options import Count, StepOrShare


@dataclass(frozen=True, kw_only=True)
class SWAPlan(RunningMeanPlan):
    """Weights ``1/(n + 1)``: every member counts the same."""

    def weight(self, n: int) -> float:
        """``1/(n + 1)``."""
        return 1.0 / (n + 1)


@dataclass(frozen=True)
class SWA:
    """Stochastic weight averaging: the plain mean of the members.

    Algorithm 1 of Lu et al. 2022 (Findings of EMNLP): ``W_SWA`` begins as the weights at switch-on, and every
    ``K`` steps after it ``W_SWA <- (n * W_SWA + W) / (n + 1)``, so the result is the mean of
    ``floor(N / K) + 1`` weights, those at switch-on included.
    """

    start: StepOrShare = 0.5
    """Switch-on. A float is a fraction of the run, ``floor(start * total_steps)``; an int is a step."""
    every: Count = 1
    """Optimizer steps between two members (``K``)."""
    include_start: bool = True
    """Whether the switch-on weights are a member. False is the convention of ``torch.optim.swa_utils``:
    the first member is the weights ``every`` steps later."""

    def plan(self, total_steps: int) -> SWAPlan:
        """The events of a run, see `Rule.plan`."""
        return SWAPlan(**spaced(self, total_steps, skipped=not self.include_start))
