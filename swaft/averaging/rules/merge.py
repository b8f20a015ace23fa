"""Merging members by given weights, in place of a learning rate that decays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from numbers import Real
from typing import Literal

import numpy as np

from swaft.averaging.rules.base import RunningMeanPlan, refuse_surplus, spaced
from swaft.errors import ConfigError
from swaft.options import Count, StepOrShare

Decay = Literal["linear", "cosine", "1-sqrt"]


@dataclass(frozen=True, kw_only=True)
class MergePlan(RunningMeanPlan):
    """One running mean, ``sum_i c_i theta_i / sum_i c_i`` over the members so far."""

    weights: tuple[float, ...]
    """``c_i``, one a member of the run; they need not sum to 1."""

    def weight(self, n: int) -> float:
        """``c_n / (c_0 + ... + c_n)``; members before the first positive weight replace each other."""
        refuse_surplus(self, n)
        total = self._totals[n]
        return self.weights[n] / total if total > 0 else 1.0

    @cached_property
    def _totals(self) -> tuple[float, ...]:
        return tuple(accumulate(self.weights))


@dataclass(frozen=True)
class Merge:
    """The members merged by weights of your choice, or by those that imitate a decay of the learning rate.

    Tian et al. 2025, WSM (arXiv 2507.17634): the merge ``sum_i c_i theta_i``, ``sum_i c_i = 1``, of checkpoints
    of a run at constant rate counts the update from member ``j - 1`` to ``j`` with ``w_j = sum_{i >= j} c_i``,
    as if the rate had decayed by that factor. So a decay ``1 = w_0 >= w_1 >= ... >= w_k >= 0`` is imitated by
    ``c_i = w_i - w_{i+1}``, ``c_k = w_k``.
    """

    weights: Sequence[float] | Decay
    """The decay of the learning rate to imitate, with ``w_j = D(j / members)`` and ``D(x)`` one of ``linear``
    (``1 - x``, which is the plain mean), ``cosine`` (``(1 + cos(pi x)) / 2``) and ``1-sqrt`` (``1 - sqrt(x)``). In
    Python also the ``c_i`` themselves, one non-negative number a member."""
    start: StepOrShare = 0.5
    """First member, where the imitated decay begins; it ends with the run. A float is a fraction of the run, an
    int a step."""
    every: Count = 1
    """Optimizer steps between two members."""

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str):  # an array's repr leaves numbers out; a tuple's says them all
            object.__setattr__(self, "weights", tuple(np.atleast_1d(self.weights).tolist()))

    def plan(self, total_steps: int) -> MergePlan:
        """The events of a run, see `Rule.plan`; numbers have to be as many as members."""
        # The number of members has to be known before there can be weights.
        plan = MergePlan(**spaced(self, total_steps), weights=())
        return replace(plan, weights=self._weights(plan.num_members))

    def _weights(self, members: int) -> tuple[float, ...]:
        weights = self.weights
        if isinstance(weights, str):
            return decay_weights(weights, members)
        if len(weights) != members:
            raise ConfigError(
                f"weights are {len(weights)} numbers for {members} members; expected one a member (start and every "
                "say how many there are)"
            )
        for i, weight in enumerate(weights):
            if not isinstance(weight, Real) or not 0.0 <= weight < math.inf:
                raise ConfigError(
                    f"weights has {weight!r} for member {i}, expected a finite number of 0 or more"
                )
        if not 0.0 < math.fsum(weights) < math.inf:
            raise ConfigError(f"weights sum to {math.fsum(weights)}, expected a finite number above 0")
        return tuple(float(weight) for weight in weights)


def decay_weights(decay: Decay, members: int) -> tuple[float, ...]:
    """The merge weights of ``members`` members that imitate a decay of the learning rate; they sum to 1."""
    shapes = {
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
        "1-sqrt": lambda x: 1.0 - math.sqrt(x),
    }
    coefficients = [shapes[decay](j / members) for j in range(members + 1)]
    return tuple(earlier - later for earlier, later in pairwise(coefficients))
