"""What rounding does to a running mean over a whole run: simulated on a small walk, against float64.

The error of a plain fp32 mean comes less from single roundings than from updates too small to register, so no
short formula gives it; a few hundred elements that walk as Adam's do show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from swaft.averaging.rules.base import RunningMeanPlan

WEIGHT_SCALE = 0.02
"""Standard deviation of the simulated weights: that of a BERT or GPT-2 matrix."""
DRIFT = 0.1
"""Size of the steady part of a step beside its noise."""

Mean = Callable[[np.ndarray, float], np.ndarray]
"""Takes a member (n,), fp32, and its weight; returns the mean so far."""


@dataclass(frozen=True)
class RoundingError:
    """Error of a mean at the end of a run."""

    displacement_share: float
    """Norm of the error, as a share of how far the exact mean has moved from the first member."""
    mean_ulps: float
    """Mean error in units in the last place of fp32; a quarter is what rounding the exact mean costs."""


def simulate(
    plan: RunningMeanPlan,
    mean: Mean,
    *,
    learning_rate: float,
    members: int | None = None,
    numel: int = 256,
    seed: int = 0,
) -> RoundingError:
    """Follow a walk with an arithmetic and with float64.

    Args:
        plan: gives the weights of the members.
        mean: the arithmetic under test.
        learning_rate: size of a step.
        members: how many; default: as many as the run has.
        numel: elements that walk.
        seed: of the walk.
    """
    exact = first = np.zeros(numel)
    result = np.zeros(numel, np.float32)
    for n, member in enumerate(
        walk(members or plan.num_members, learning_rate=learning_rate, numel=numel, seed=seed)
    ):
        if n == 0:
            exact = first = member.astype(np.float64)
            result = mean(member, 1.0)
        elif (weight := plan.weight(n)) > 0:
            exact = exact + weight * (member - exact)
            result = mean(member, weight)
    error = np.abs(result - exact)
    return RoundingError(
        displacement_share=float(np.linalg.norm(error) / np.linalg.norm(exact - first)),
        mean_ulps=float(np.mean(error / np.spacing(np.abs(exact).astype(np.float32)))),
    )


def walk(steps: int, *, learning_rate: float, numel: int, seed: int) -> Iterator[np.ndarray]:
    """Weights in fp32 that move by about the learning rate a step, part drift, part noise, as under Adam."""
    generator = np.random.default_rng(seed)
    weights = (WEIGHT_SCALE * generator.standard_normal(numel)).astype(np.float32)
    drift = (learning_rate * DRIFT * generator.standard_normal(numel)).astype(np.float32)
    rate = np.float32(learning_rate)
    for _ in range(steps):
        yield weights
        weights = weights + (drift + rate * generator.standard_normal(numel, dtype=np.float32))


def native_mean(*, compensated: bool) -> Mean:
    """One running mean as training keeps it, by the compiled loops.

    Args:
        compensated: in 6 bytes an element; otherwise the plain form, in 4.
    """
    from swaft.averaging import native  # compiled code, which importing swaft does not pay for

    mean, words = np.empty(0, np.float32), np.empty(0, np.uint16)

    def update(member: np.ndarray, weight: float) -> np.ndarray:
        nonlocal mean, words
        table = (np.array([member.ctypes.data]), np.array([0]), np.array([member.size]))
        if weight == 1.0:
            mean, words = member.copy(), np.zeros(member.size, np.uint16)
        elif compensated:
            native.update(*table, mean, words, np.float32(weight))
        else:
            native.update_plain(*table, mean, np.float32(weight))
        return mean

    return update
