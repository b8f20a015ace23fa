"""Which optimizer steps enter the average, and with what weight: pure arithmetic, no tensors.

A rule turns a run length into a :class:`Plan`. Every rule here is a running mean of the form

    mean <- mean + w_n * (weights - mean),      n = members already in the mean,

so a rule is the sequence ``w_n`` and the steps at which it is used. The first member always has ``w_0 = 1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

from swaft.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """The averaging events of one run.

    Steps are applied optimizer steps: "step ``t``" is the weights after ``t`` updates, step 0 those before
    training.
    """

    first_step: int
    """Step of the first member."""
    every: int
    """Optimizer steps between two members."""
    total_steps: int
    """Optimizer steps of the whole run."""
    weight: Callable[[int], float]
    """Weight of the next member, given how many are already in the mean."""

    def takes(self, step: int) -> bool:
        """Whether the weights after ``step`` updates are a member."""
        return step >= self.first_step and (step - self.first_step) % self.every == 0

    @property
    def num_members(self) -> int:
        """Members in the average at the end of the run."""
        return max(0, (self.total_steps - self.first_step) // self.every + 1)


class Rule(Protocol):
    """Anything that can plan the averaging events of a run."""

    def plan(self, total_steps: int) -> Plan:
        """The events of a run of ``total_steps`` optimizer steps."""
        ...


@dataclass(frozen=True)
class SWA:
    """Stochastic weight averaging: the plain mean of the members.

    Algorithm 1 of Lu et al. 2022 (Findings of EMNLP): ``W_SWA`` begins as the weights at switch-on, and every
    ``K`` steps after it ``W_SWA <- (n * W_SWA + W) / (n + 1)``, so the result is the mean of
    ``floor(N / K) + 1`` weights, those at switch-on included.
    """

    start: float | int = 0.5
    """Switch-on. A float is a fraction of the run, ``floor(start * total_steps)``; an int is a step."""
    every: int = 1
    """Optimizer steps between two members (``K``)."""
    include_start: bool = True
    """Whether the switch-on weights are a member. False is the convention of ``torch.optim.swa_utils``:
    the first member is the weights ``every`` steps later."""

    def plan(self, total_steps: int) -> Plan:
        """The events of a run of ``total_steps`` optimizer steps.

        Raises:
            ConfigError: the start or interval is out of range, or fewer than two weights would be averaged.
        """
        first = resolve_start(self.start, total_steps) + (0 if self.include_start else self.every)
        return _checked(Plan(first, self.every, total_steps, lambda n: 1.0 / (n + 1)), start=self.start)


@dataclass(frozen=True)
class EMA:
    """Exponential moving average: ``mean <- decay * mean + (1 - decay) * weights``, begun at the first member."""

    decay: float = 0.999
    """Share of the old mean that each event keeps, strictly between 0 and 1."""
    start: float | int = 0
    """First member. A float is a fraction of the run, an int a step; 0 is the weights before training."""
    every: int = 1
    """Optimizer steps between two members."""

    def plan(self, total_steps: int) -> Plan:
        """The events of a run of ``total_steps`` optimizer steps.

        Raises:
            ConfigError: decay, start or interval is out of range, or fewer than two weights would be averaged.
        """
        if not 0.0 < self.decay < 1.0:
            raise ConfigError(
                f"averaging.decay is {self.decay}, expected a number strictly between 0 and 1 (0.999, say)"
            )
        plan = Plan(
            resolve_start(self.start, total_steps),
            self.every,
            total_steps,
            lambda n: 1.0 if n == 0 else 1.0 - self.decay,
        )
        return _checked(plan, start=self.start)


def resolve_start(start: float | int, total_steps: int) -> int:
    """The step a start means: a float is ``floor(start * total_steps)``, an int is the step itself.

    Raises:
        ConfigError: a fraction outside [0, 1], or a negative step.
    """
    if not isinstance(start, Real) or isinstance(start, bool):
        raise ConfigError(f"averaging.start is {start!r}, expected a fraction (0.5) or a step (100)")
    if not isinstance(start, Integral):
        if not 0.0 <= start <= 1.0:
            raise ConfigError(
                f"averaging.start is the fraction {start}, expected one between 0.0 and 1.0; "
                "write an integer to name a step"
            )
        return math.floor(float(start) * total_steps)
    if start < 0:
        raise ConfigError(
            f"averaging.start is step {start}, expected 0 (the weights before training) or later"
        )
    return int(start)


def _checked(plan: Plan, *, start: float | int) -> Plan:
    if not isinstance(plan.every, Integral) or plan.every < 1:
        raise ConfigError(f"averaging.every is {plan.every!r}, expected a whole number of steps, at least 1")
    if plan.num_members < 2:
        raise ConfigError(
            f"averaging.start={start} with averaging.every={plan.every} puts the first member at step "
            f"{plan.first_step} of {plan.total_steps}, so {plan.num_members} weights would be averaged; "
            "expected at least 2: start earlier (averaging.start) or train longer (train.max_steps, "
            "train.num_train_epochs)"
        )
    return plan
