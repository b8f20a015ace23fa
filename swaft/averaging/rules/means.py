"""The rules whose average is fixed before training: SWA, EMA, Merge (one running mean), LAWA and BEMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from numbers import Integral, Real
from typing import Annotated, Literal

import numpy as np

from swaft.averaging.rules.base import SettledPlan, Update, one_mean, spaced
from swaft.errors import ConfigError
from swaft.fraction import share_of
from swaft.options import Count, NotNegative, Range, StepOrShare

Warmup = Literal["none", "ramp", "debias"]
Decay = Literal["linear", "cosine", "1-sqrt"]

HALF_LIFE = 0.1
"""Of an EMA, as a share of the run, as docs/evidence.md recommends."""


@dataclass(frozen=True)
class SWA:
    """Stochastic weight averaging: the plain mean of the members.

    Algorithm 1 of Lu et al. 2022 (Findings of EMNLP): ``W_SWA`` begins as the weights at switch-on, and every
    ``K`` steps after it ``W_SWA <- (n * W_SWA + W) / (n + 1)``, so the result is the mean of
    ``floor(N / K) + 1`` weights, including those at switch-on.
    """

    start: StepOrShare = 0.5
    """Switch-on. A float is a fraction of the run, ``floor(start * total_steps)``; an int is a step."""
    every: Count = 1
    """Optimizer steps between two members (``K``)."""
    include_start: bool = True
    """Whether the switch-on weights are a member. False is the convention of ``torch.optim.swa_utils``:
    the first member is the weights ``every`` steps later."""

    def plan(self, total_steps: int) -> SettledPlan:
        """The events of a run, see `Rule.plan`."""
        steps = spaced(self, total_steps, skipped=0 if self.include_start else 1)
        return SettledPlan(**steps, moves=one_mean(lambda n: 1.0 / (n + 1)))


@dataclass(frozen=True)
class EMA:
    """Exponential moving average: ``mean <- decay * mean + (1 - decay) * weights``, started at the first member."""

    decay: Annotated[float, Range(above=0, below=1)] | None = None
    """Share of the old mean that each event keeps. None: derived from `half_life`."""
    start: StepOrShare = 0
    """First member. A float is a fraction of the run, an int a step; 0 is the weights before training."""
    every: Count = 1
    """Optimizer steps between two members."""
    half_life: Annotated[float, Range(above=0, high=1)] | Count | None = None
    """Instead of `decay`: the time after which a member counts half as much. A float is a fraction of the run, an
    int is optimizer steps; each event then keeps ``0.5 ** (every / steps)``. 0.1 if neither is given."""
    warmup: Warmup = "none"
    """How a young average forgets its starting point. ``none``: the first member keeps the share ``decay ** n``.
    ``ramp``: the decay is at most ``(1 + n)/(10 + n)`` at member ``n`` (counted from 0), as in TensorFlow's
    ExponentialMovingAverage. ``debias``: weights ``(1 - decay)/(1 - decay ** (n + 1))``. This is Adam's bias
    correction (Kingma & Ba 2015, section 3): a sum that starts at zero, divided by ``1 - decay ** (n + 1)``."""

    def __post_init__(self) -> None:
        if self.decay is None and self.half_life is None:
            object.__setattr__(self, "half_life", HALF_LIFE)  # so that the repr says it

    def plan(self, total_steps: int) -> SettledPlan:
        """The events of a run, see `Rule.plan`; `decay` and `half_life` are mutually exclusive."""
        steps, decay = spaced(self, total_steps), self.decay_in(total_steps)
        weights: dict[str, Callable[[int], float]] = {
            "none": lambda n: 1.0 - decay,
            "ramp": lambda n: 1.0 - min(decay, (1 + n) / (10 + n)),
            # 1 - decay^(n + 1), without losing the digits of a decay next to 1.
            "debias": lambda n: (1.0 - decay) / -math.expm1((n + 1) * math.log(decay)),
        }
        return SettledPlan(**steps, moves=one_mean(weights[self.warmup]))

    def decay_in(self, total_steps: int) -> float:
        """The share of the old mean that each event of a run keeps.

        Raises:
            ConfigError: `decay` and `half_life` are both given, or the half-life gives no decay between 0 and 1.
        """
        half_life = self.half_life
        if half_life is None:
            return float(self.decay)  # type: ignore[arg-type]  # one of the two is there
        if self.decay is not None:
            raise ConfigError(
                f"decay is {self.decay} and half_life is {half_life}; expected one of the two, since each "
                "determines the other"
            )
        steps = float(half_life if isinstance(half_life, Integral) else share_of(total_steps, half_life))
        decay = 0.5 ** (self.every / steps)
        if not 0.0 < decay < 1.0:
            raise ConfigError(
                f"half_life={half_life} with every={self.every} keeps the share {decay} of the old mean at each "
                "event, expected one strictly between 0 and 1"
            )
        return decay


@dataclass(frozen=True)
class Merge:
    """Members merged with weights of your choice, or with weights that imitate a learning rate decay.

    Tian et al. 2025, WSM (arXiv 2507.17634): the merge ``sum_i c_i theta_i``, ``sum_i c_i = 1``, of checkpoints
    of a run at a constant learning rate counts the update from member ``j - 1`` to ``j`` with ``w_j = sum_{i >= j}
    c_i``, as if the learning rate had decayed by that factor. So a decay ``1 = w_0 >= w_1 >= ... >= w_k >= 0`` is
    imitated by ``c_i = w_i - w_{i+1}``, ``c_k = w_k``.
    """

    weights: Sequence[float] | Decay
    """The learning rate decay to imitate, with ``w_j = D(j / members)`` and ``D(x)`` one of ``linear`` (``1 - x``,
    which is the plain mean), ``cosine`` (``(1 + cos(pi x)) / 2``) and ``1-sqrt`` (``1 - sqrt(x)``). In Python, also
    the ``c_i`` themselves: one non-negative number per member."""
    start: StepOrShare = 0.5
    """First member, where the imitated decay begins; it ends with the run. A float is a fraction of the run, an
    int a step."""
    every: Count = 1
    """Optimizer steps between two members."""

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str):  # an array's repr omits numbers; a tuple's does not
            object.__setattr__(self, "weights", tuple(np.atleast_1d(self.weights).tolist()))

    def plan(self, total_steps: int) -> SettledPlan:
        """The events of a run, see `Rule.plan`; explicit weights must be as many as the members.

        A member's weight is ``c_n / (c_0 + ... + c_n)``; members before the first positive one replace each other.
        """
        # The number of members must be known before the weights can be computed.
        plan = SettledPlan(**spaced(self, total_steps), moves=lambda n: (), fixed_length=True)
        weights = self._weights(plan.num_members)
        totals = tuple(accumulate(weights))
        return replace(plan, moves=one_mean(lambda n: weights[n] / totals[n] if totals[n] > 0 else 1.0))

    def _weights(self, members: int) -> tuple[float, ...]:
        weights = self.weights
        if isinstance(weights, str):  # they sum to 1
            shapes = {
                "linear": lambda x: 1.0 - x,
                "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
                "1-sqrt": lambda x: 1.0 - math.sqrt(x),
            }
            coefficients = [shapes[weights](j / members) for j in range(members + 1)]
            return tuple(earlier - later for earlier, later in pairwise(coefficients))
        if len(weights) != members:
            raise ConfigError(
                f"weights are {len(weights)} numbers for {members} members; expected one per member (start and "
                "every determine how many there are)"
            )
        for i, weight in enumerate(weights):
            if not isinstance(weight, Real) or not 0.0 <= weight < math.inf:
                raise ConfigError(
                    f"weights has {weight!r} for member {i}, expected a finite number of 0 or more"
                )
        if not 0.0 < math.fsum(weights) < math.inf:
            raise ConfigError(f"weights sum to {math.fsum(weights)}, expected a finite number above 0")
        return tuple(float(weight) for weight in weights)


@dataclass(frozen=True)
class LAWA:
    """Latest weight averaging: the plain mean of the last ``last`` members.

    Kaddour 2022 (arXiv 2209.14981), with one member at the end of each epoch; Sanyal et al. 2024 (arXiv 2306.03241)
    for language models, with 5 checkpoints far apart and a high learning rate.
    """

    last: Annotated[int, Range(low=2)] = 10
    """Members in the mean, each kept whole at 4 bytes per element."""
    start: StepOrShare = 0
    """First member. A float is a fraction of the run, an int a step; 0 is the weights before training."""
    every: Count = 1
    """Optimizer steps between two members."""

    def plan(self, total_steps: int) -> SettledPlan:
        """The events of a run, see `Rule.plan`; the run must have at least `last` members.

        The lanes are a ring of copies: each member replaces the oldest.
        """

        def average(members: int) -> dict[int, float]:
            filled = min(members, self.last)
            return dict.fromkeys(range(filled), 1.0 / filled)

        plan = SettledPlan(
            **spaced(self, total_steps),
            kinds=(False,) * self.last,
            moves=lambda n: (Update(n % self.last, 1.0),),
            average=average,
            last=self.last,
        )
        if plan.num_members < self.last:
            raise ConfigError(
                f"last is {self.last}, but start={self.start} with every={self.every} gives {plan.num_members} "
                f"members in {total_steps} steps; lower one of the three"
            )
        return plan


@dataclass(frozen=True)
class BEMA:
    """Bias-corrected exponential moving average: an EMA, pushed on along what training has moved since its start.

    Block & Zhang 2025, "EMA Without the Lag" (arXiv 2508.00180), algorithm 1: at step ``t``

        beta = (rho + gamma t) ** -kappa             mean <- (1 - beta) mean + beta theta_t
        alpha = (rho + gamma t) ** -eta              average = mean + alpha (theta_t - theta_0)

    every ``phi`` steps after a burn-in of ``tau``, at whose end ``mean = theta_0 = theta_tau``. The defaults are
    the authors' and TRL's. TRL's BEMACallback computes these formulas, with ``t`` counted from the start of
    training, as here. The authors' code (abblock/bema) has ``1 + t - tau + rho`` in place of ``rho + gamma t``,
    which is one step more where ``tau = 0``, and a floor of 1e-4 for ``beta``, reached after a hundred million
    steps.
    """

    ema_power: NotNegative = 0.5
    """How fast the average slows down, the paper's ``kappa``; at 0 the mean is the latest weights."""
    bias_power: NotNegative = 0.2
    """How fast the correction fades, ``eta``: at 0 it never fades; the larger, the sooner it is gone."""
    lag: Count = 10
    """The age, in steps, that the run is given at its start, ``rho``."""
    multiplier: NotNegative = 1.0
    """How much each step adds to the age of the run, ``gamma``."""
    start: StepOrShare = 0
    """First member, ``theta_0`` (``tau``). A float is a fraction of the run, an int a step; 0 is the weights before
    training."""
    every: Count = 400
    """Optimizer steps between two members (``phi``). The mean remembers about ``sqrt(t)`` members, so this decides
    how far back it reaches."""

    def plan(self, total_steps: int) -> SettledPlan:
        """The events of a run, see `Rule.plan`; the lanes are the running mean, the first and the latest member."""
        steps = spaced(self, total_steps)
        mean, first, latest = range(3)

        def age(n: int) -> float:
            return self.lag + self.multiplier * (steps["first_step"] + n * self.every)

        def moves(n: int) -> tuple[Update, ...]:
            if n == 0:
                return (Update(mean, 1.0), Update(first, 1.0), Update(latest, 1.0))
            return (Update(mean, age(n) ** -self.ema_power), Update(latest, 1.0))

        def average(members: int) -> dict[int, float]:
            alpha = age(members - 1) ** -self.bias_power
            return {mean: 1.0, latest: alpha, first: -alpha}

        return SettledPlan(**steps, kinds=(True, False, False), moves=moves, average=average)
