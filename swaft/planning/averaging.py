"""What averaging takes on the rank that owns most: events, host memory, traffic, and time beside the step."""

from __future__ import annotations

from dataclasses import dataclass

from swaft.averaging.host.averages import STAGING_BYTES, seconds_an_element
from swaft.averaging.host.crew import Crew
from swaft.averaging.host.memory import lane_bytes
from swaft.averaging.host.source import ring_bytes
from swaft.averaging.rules import Plan
from swaft.config import AveragingConfig
from swaft.planning.memory import FP32


@dataclass(frozen=True, kw_only=True)
class AveragingPlan:
    """Averaging on one rank, over the whole run."""

    events: int
    """Steps whose weights are averaged."""
    first_step: int
    every: int
    """Optimizer steps between two events."""
    total_steps: int
    """Optimizer steps of the run."""
    elements: int
    """Master elements that the rank owns."""
    host_bytes: int
    """Most memory that the averages take, in host memory."""
    pinned_bytes: int
    """Of the staging ring; 0 where the masters are in host memory."""
    copied_bytes: int
    """Copied from the device to the host at each event; 0 where the masters are in host memory."""
    threads: int
    """Of the arithmetic."""
    event_seconds: float
    """Arithmetic of an event, behind the steps, at the rate of this machine now."""
    share_of_step: float | None
    """Arithmetic of an event by the time between two events; above 1 training waits for it. None: no step's time is
    known."""

    @property
    def waits(self) -> bool | None:
        """Whether training has to wait for averaging."""
        return None if self.share_of_step is None else self.share_of_step > 1


def plan_averaging(
    plan: Plan,
    settings: AveragingConfig,
    *,
    elements: int,
    masters_on_device: bool,
    step_seconds: float | None,
) -> AveragingPlan:
    """Return what averaging takes.

    Args:
        plan: the rule's numbers for the run.
        settings: section ``averaging``.
        elements: master elements that the rank owns.
        masters_on_device: whether they have to be copied to the host.
        step_seconds: of a training step, measured; None: not known.
    """
    crew = Crew(settings.threads)
    try:
        rate = seconds_an_element(crew, elements)
    finally:
        crew.close()
    updates = max(len(plan.updates(1)), 1)
    event_seconds = updates * elements * rate
    return AveragingPlan(
        events=plan.num_members,
        first_step=plan.first_step,
        every=plan.every,
        total_steps=plan.total_steps,
        elements=elements,
        host_bytes=lane_bytes(
            plan,
            elements,
            compensated=settings.precision == "compensated",
            spilled=settings.spill_dir is not None,
        ),
        pinned_bytes=ring_bytes(elements, STAGING_BYTES) if masters_on_device else 0,
        copied_bytes=FP32 * elements if masters_on_device else 0,
        threads=crew.threads,
        event_seconds=event_seconds,
        share_of_step=None if step_seconds is None else event_seconds / (plan.every * step_seconds),
    )
