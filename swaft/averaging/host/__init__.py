"""One rank's averages in host memory, updated in the background: lanes, threads that move them, a pipeline.

Also a forecast of their cost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swaft.averaging import native
from swaft.averaging.engines import Engine
from swaft.averaging.host.lanes import Lanes, require_writable
from swaft.averaging.host.machine import Workers, lane_bytes, require_host_memory, swap_bytes
from swaft.averaging.host.pipeline import ChangeCheck, Pipeline
from swaft.averaging.host.source import HostSource, Source, StagedSource, ring_bytes, shares, table
from swaft.averaging.layout import Span
from swaft.averaging.rules import Plan
from swaft.averaging.swap import rescales

STAGING_BYTES = 1 << 29
"""Maximum pinned memory per rank: 512 MiB."""
RATE_SAMPLE = 1 << 22
"""Number of elements used to measure the speed of the arithmetic."""
DEVICE = attrgetter("device")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Memory, traffic and time of one rank's averages over the whole run."""

    elements: int
    """Elements this rank owns."""
    events: int
    """Number of steps at which a member is copied; all rules share the copy."""
    host_bytes: int
    """Peak host memory of the averages while the run trains."""
    swap_bytes: int
    """Additional host memory while an average is swapped in, or weights are exported."""
    pinned_bytes: int
    """Pinned memory of the staging ring; 0 if the masters are in host memory."""
    copied_bytes: int
    """Bytes copied from the device per event: 4 per owned element, one way; 0 if the masters are in host memory."""
    threads: int
    """Threads that do the arithmetic."""
    seconds: float
    """Seconds of arithmetic per event, at the speed measured now. Shorter training steps have to wait for it."""

    def __str__(self) -> str:
        def mib(count: int) -> str:
            return f"{count / 2**20:,.1f} MiB"

        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        lines = [
            f"{self.events:,} events, {self.elements:,} elements on this rank",
            f"host memory {mib(self.host_bytes)}, {mib(self.swap_bytes)} more in a swap or an export, "
            f"pinned {mib(self.pinned_bytes)}, copied {mib(self.copied_bytes)} per event",
            f"{self.seconds:.3g} s of arithmetic per event on {threads}, "
            "in the background; a shorter training step waits for it",
        ]
        return "\n".join(lines)


class HostAverages:
    """The averages of one rank's shard, in its host memory (creating them is collective).

    Args:
        engine: provides the masters.
        plans: by name of the rule.
        compensated: keep running means to 32 bits (6 bytes per element) instead of 24 (4 bytes).
        threads: as for `WeightAverager`.
        spill_dir: as for `WeightAverager`; finished lanes move there, to unnamed files that vanish with the
            process.

    Raises:
        AveragingError: a node has too little memory; on every rank.
    """

    def __init__(
        self,
        engine: Engine,
        plans: Mapping[str, Plan],
        *,
        compensated: bool = True,
        threads: int | None = None,
        spill_dir: Path | None = None,
    ):
        ranks, device, numel = engine.ranks, engine.device, engine.numel
        self._engine, self.compensated = engine, compensated
        self._forwards_write = rescales(engine.module)
        self.host_bytes = sum(
            lane_bytes(plan, numel, compensated=compensated, spilled=spill_dir is not None)
            for plan in plans.values()
        )
        self.pinned_bytes = 0 if device.type == "cpu" else ring_bytes(numel, STAGING_BYTES)
        self.swap_bytes = swap_bytes(plans.values(), numel, stashed=engine.masters_are_working())
        require_host_memory(ranks, self.host_bytes + self.swap_bytes + self.pinned_bytes)
        with ranks.together():
            if spill_dir is not None:
                require_writable(spill_dir)
        self.workers = Workers(threads, device=device)
        self._host = HostSource(engine.spans, self.workers)
        self._staged: StagedSource | None = None
        self.lanes = {
            name: Lanes(plan, numel, self.workers, compensated=compensated, spill=spill_dir)
            for name, plan in plans.items()
        }
        self.changes = ChangeCheck(self.workers)
        self._channel = ranks.channel()
        self.pipeline = Pipeline(
            self.lanes, self.changes, sum_over_ranks=self._channel.sum, world_size=ranks.world_size
        )

    def submit(self, masters: list[Tensor], *, step: int, rules: tuple[str, ...]) -> None:
        """Add the masters to the averages of some rules, in the background; see `Pipeline.submit`.

        If forwards write to the weights, it waits until the masters may be written to.
        """
        self.pipeline.submit(self._source(masters), masters, step=step, rules=rules)
        if self._forwards_write:
            self.pipeline.release_masters()

    def forecast(self) -> Forecast:
        """What the run's averages cost on this rank."""
        plans, elements = [lanes.plan for lanes in self.lanes.values()], self._engine.numel
        events = {step for plan in plans for step in range(plan.first_step, plan.total_steps + 1, plan.every)}
        updates = max(sum(len(plan.updates(1)) for plan in plans), 1)
        return Forecast(
            elements=elements,
            events=len(events),
            host_bytes=self.host_bytes,
            swap_bytes=self.swap_bytes,
            pinned_bytes=self.pinned_bytes,
            copied_bytes=4 * elements if self.pinned_bytes else 0,
            threads=self.workers.threads,
            seconds=updates * elements * seconds_an_element(self.workers, elements),
        )

    def close(self) -> None:
        """Finish the work in progress and end the threads."""
        self._engine.stop()
        self.pipeline.close()
        self.workers.close()
        self._channel.close()

    def _source(self, masters: list[Tensor]) -> Source:
        """The source for the masters as they are now: offloading may have moved them since the last member."""
        devices = set(map(DEVICE, masters)) - {torch.device("cpu")}
        if not devices:
            return self._host
        device = devices.pop()
        if self._staged is None:
            self._staged = StagedSource(
                self._engine.spans,
                self.workers,
                device=device,
                api=torch.get_device_module(device),
                limit_bytes=STAGING_BYTES,
                lent=self._engine.lends_storage,
            )
        return self._staged


def seconds_an_element(workers: Workers, numel: int) -> float:
    """Measure how many seconds one update of a running mean takes per element.

    Args:
        workers: do the arithmetic.
        numel: elements of a shard; at most `RATE_SAMPLE` are measured.
    """
    numel = min(RATE_SAMPLE, numel) or 1
    member, mean, words = np.zeros(numel, np.float32), np.zeros(numel, np.float32), np.zeros(numel, np.uint16)
    tables = [table(part, [member.ctypes.data]) for part in shares([Span(0, 0, 0, numel)], workers)]
    seconds = []
    for _ in range(4):  # the first run touches the memory
        begun = time.perf_counter()
        workers.run(native.update, [(*each, mean, words, 0.5) for each in tables])
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:]) / numel
