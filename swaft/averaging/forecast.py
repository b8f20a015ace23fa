"""What averaging will take on one rank, told before the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swaft.averaging.rounding import RoundingError, native_mean, simulate
from swaft.averaging.rules.base import Plan, RunningMeanPlan

if TYPE_CHECKING:
    from swaft.averaging.host import HostAverages


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
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        lines = [
            f"{self.events:,} events, {self.elements:,} elements on this rank",
            f"host memory {_size(self.host_bytes)}, pinned {_size(self.pinned_bytes)}, copied "
            f"{_size(self.copied_bytes)} an event",
            f"{self.seconds:.3g} s of arithmetic an event on {threads}, behind the step; "
            "a shorter step waits for it",
        ]
        for name, error in self.plain_errors.items():
            lines.append(
                f"{name}: the plain form ends {error.displacement_share:.1e} of the average's displacement away "
                f"({error.mean_ulps:,.1f} ulp; averaging.precision=compensated: 0.3)"
            )
        return "\n".join(lines)


def forecast(
    averages: HostAverages,
    plans: Mapping[str, Plan],
    *,
    elements: int,
    learning_rate: float,
    compensated: bool,
) -> Forecast:
    """What the averages of a run take on this rank.

    Args:
        averages: of this rank, before or during the run.
        plans: by name of the rule.
        elements: elements of the shard.
        learning_rate: peak rate of the run, for the error of the plain form; that of a rate of 0 is not told.
        compensated: the form in use.
    """
    events = {
        step for plan in plans.values() for step in range(plan.first_step, plan.total_steps + 1, plan.every)
    }
    errors = {}
    if not compensated and learning_rate > 0:
        running = {name: plan for name, plan in plans.items() if isinstance(plan, RunningMeanPlan)}
        errors = {
            name: simulate(plan, native_mean(compensated=False), learning_rate=learning_rate)
            for name, plan in running.items()
        }
    updates = max(sum(len(plan.updates(1)) for plan in plans.values()), 1)
    return Forecast(
        elements=elements,
        events=len(events),
        host_bytes=averages.host_bytes,
        pinned_bytes=averages.pinned_bytes,
        copied_bytes=4 * elements if averages.pinned_bytes else 0,
        threads=averages.crew.threads,
        seconds=updates * elements * averages.seconds_an_element(),
        plain_errors=errors,
    )


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"
