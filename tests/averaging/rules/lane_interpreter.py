"""Runs a rule's table of updates on float64 vectors, as plainly as its words can be read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from swaft.averaging.rules import Plan, Readout


def steps_of(plan: Plan) -> list[int]:
    """Steps that the plan takes."""
    return [step for step in range(plan.total_steps + 1) if plan.takes(step)]


def weights_of(plan: Plan) -> list[float]:
    """Weight of every member in the plan's only lane."""
    return [sum(update.weight for update in plan.updates(n)) for n in range(plan.num_members)]


def random_members(plan: Plan, size: int = 3) -> np.ndarray:
    """Members of a run that drifts and jitters: (num_members, size)."""
    random = np.random.default_rng(plan.total_steps)
    return np.cumsum(random.normal(1.0, 2.0, (plan.num_members, size)), axis=0)


def lanes_along(plan: Plan, members: np.ndarray) -> Iterator[dict[int, np.ndarray]]:
    """The lanes after each member."""
    lanes: dict[int, np.ndarray] = {}
    for n, member in enumerate(members):
        for update in plan.updates(n):
            source = member if update.source is None else lanes[update.source]
            if update.weight == 1.0:
                lanes[update.lane] = source.copy()
            else:
                lanes[update.lane] = lanes[update.lane] + update.weight * (source - lanes[update.lane])
        yield lanes


def averages(plan: Plan, members: np.ndarray, **choices: float) -> list[np.ndarray]:
    """The average after each member."""
    return [
        sum(c * lanes[i] for i, c in plan.readout(count, Readout(**choices)).items())
        for count, lanes in enumerate(lanes_along(plan, members), start=1)
    ]
