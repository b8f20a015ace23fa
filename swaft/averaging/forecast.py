"""What averaging will take on one rank, and what rounding would do to the mean, before the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from swaft.averaging.rules import Plan

if TYPE_CHECKING:
    from swaft.averaging.engines import Engine
    from swaft.averaging.host import HostAverages

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


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Memory, traffic and rounding of one rank's averages over the whole run."""

    elements: int
    """Elements this rank owns."""
    events: int
    """Steps at which a member is copied; all rules share the copy."""
    host_bytes: int
    """Most host memory the averages take."""
    pinned_bytes: int
    """Pinned memory of the staging ring; 0 where the masters are in host memory."""
    copied_bytes: int
    """Bytes copied from the device an event: 4 an owned element, one way; 0 where they are in host memory."""
    threads: int
    """Threads of the arithmetic."""
    seconds: float
    """Seconds of arithmetic an event, at the rate measured now. Steps shorter than this have to wait for it."""
    plain_errors: dict[str, RoundingError]
    """By rule: what the plain form loses over this run; empty for the compensated form, which keeps 32 bits."""

    def __str__(self) -> str:
        sizes = (
            f"{count / 2**20:,.1f} MiB" for count in (self.host_bytes, self.pinned_bytes, self.copied_bytes)
        )
        lines = [
            f"{self.events:,} events, {self.elements:,} elements on this rank",
            "host memory {}, pinned {}, copied {} an event".format(*sizes),
            f"{self.seconds:.3g} s of arithmetic an event on {self.threads} thread{'s' * (self.threads > 1)}, "
            "behind the step; a shorter step waits for it",
        ]
        lines += [
            f"{name}: the plain form ends {error.displacement_share:.1e} of the average's displacement away "
            f"({error.mean_ulps:,.1f} ulp; averaging.precision=compensated: 0.3)"
            for name, error in self.plain_errors.items()
        ]
        return "\n".join(lines)


def forecast(engine: Engine, averages: HostAverages) -> Forecast:
    """What the averages of a run take on this rank.

    Args:
        engine: whose weights; the optimizer's peak rate decides the error of the plain form.
        averages: of this rank, before or during the run.
    """
    from swaft.averaging.host import seconds_an_element  # compiled code, as below

    plans = {name: lanes.plan for name, lanes in averages.lanes.items()}
    groups, elements = engine.inner_optimizer.param_groups, engine.numel
    rate = float(max(group.get("initial_lr", group.get("lr", 0.0)) for group in groups))
    events = {
        step for plan in plans.values() for step in range(plan.first_step, plan.total_steps + 1, plan.every)
    }
    updates = max(sum(len(plan.updates(1)) for plan in plans.values()), 1)
    return Forecast(
        elements=elements,
        events=len(events),
        host_bytes=averages.host_bytes,
        pinned_bytes=averages.pinned_bytes,
        copied_bytes=4 * elements if averages.pinned_bytes else 0,
        threads=averages.workers.threads,
        seconds=updates * elements * seconds_an_element(averages.workers, elements),
        plain_errors={
            name: simulate(plan, plain_mean(), learning_rate=rate)
            for name, plan in plans.items()
            if plan.lanes == (True,) and not averages.compensated and rate > 0
        },
    )


def simulate(
    plan: Plan, mean: Mean, *, learning_rate: float, numel: int = 256, seed: int = 0
) -> RoundingError:
    """Follow a walk over a whole run with an arithmetic and with float64.

    The error of a plain fp32 mean comes less from single roundings than from updates too small to register, so no
    short formula gives it; a few hundred elements show it, which walk as under Adam: by about
    the learning rate a step, part drift, part noise.

    Args:
        plan: of one running mean; gives the weights of the members, and their number.
        mean: the arithmetic under test.
        learning_rate: size of a step.
        numel: elements that walk.
        seed: of the walk.
    """
    generator = np.random.default_rng(seed)
    member = (WEIGHT_SCALE * generator.standard_normal(numel)).astype(np.float32)
    drift = (learning_rate * DRIFT * generator.standard_normal(numel)).astype(np.float32)
    exact = first = member.astype(np.float64)
    result = mean(member, 1.0)
    for n in range(1, plan.num_members):
        noise = generator.standard_normal(numel, dtype=np.float32)
        member = member + (drift + np.float32(learning_rate) * noise)
        for weight in (update.weight for update in plan.updates(n)):
            exact = exact + weight * (member - exact)
            result = mean(member, weight)
    error = np.abs(result - exact)
    return RoundingError(
        displacement_share=float(np.linalg.norm(error) / np.linalg.norm(exact - first)),
        mean_ulps=float(np.mean(error / np.spacing(np.abs(exact).astype(np.float32)))),
    )


def plain_mean() -> Mean:
    """One running mean in its plain form, in the bits of :mod:`swaft.averaging.native`."""
    mean = np.empty(0, np.float32)

    def update(member: np.ndarray, weight: float) -> np.ndarray:
        nonlocal mean
        mean = member.copy() if weight == 1.0 else mean + (member - mean) * np.float32(weight)
        return mean

    return update
