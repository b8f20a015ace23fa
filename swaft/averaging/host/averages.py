"""All averages of one rank: their lanes, the threads that move them, and the way members take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from swaft.averaging.host.crew import Crew
from swaft.averaging.host.lanes import Lanes
from swaft.averaging.host.memory import lane_bytes, require_host_memory
from swaft.averaging.host.motion import Motion
from swaft.averaging.host.pipeline import Pipeline, Waits
from swaft.averaging.host.source import HostSource, Source, StagedSource, ring_bytes
from swaft.averaging.host.spill import require_writable
from swaft.averaging.layout import Span
from swaft.averaging.rules import SWA, Plan
from swaft.distributed import Ranks

STAGING_BYTES = 1 << 29
"""Most pinned memory a rank takes: 512 MiB."""
RATE_SAMPLE = 1 << 22
"""Elements on which the rate of the arithmetic is measured."""
DEVICE = attrgetter("device")
_ONE_MEAN = SWA(start=0).plan(total_steps=9)


class HostAverages:
    """The averages of one rank's shard, in its host memory (creating them is collective).

    Args:
        spans: where the shard lies in the master buffers.
        plans: by name of the rule.
        ranks: who trains together.
        device: where the masters are.
        compensated: keep running means to 32 bits (6 bytes an element) instead of 24 (4 bytes).
        threads: threads of the arithmetic; None chooses.
        spill_dir: folder that finished lanes move to, in files without a name, which end with the process; None
            keeps them in memory.
        lent: others may free the masters' storage between members.

    Raises:
        AveragingError: on every rank, where a node's memory is too small.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        plans: Mapping[str, Plan],
        *,
        ranks: Ranks,
        device: torch.device,
        compensated: bool = True,
        threads: int | None = None,
        spill_dir: Path | None = None,
        lent: bool = False,
    ):
        self._spans, self._lent = spans, lent
        numel = sum(span.numel for span in spans)
        self.host_bytes = sum(
            lane_bytes(plan, numel, compensated=compensated, spilled=spill_dir is not None)
            for plan in plans.values()
        )
        self.pinned_bytes = 0 if device.type == "cpu" else ring_bytes(numel, STAGING_BYTES)
        require_host_memory(ranks, self.host_bytes + self.pinned_bytes)
        with ranks.together():
            if spill_dir is not None:
                require_writable(spill_dir)
        self.crew = Crew(threads, device=device)
        self._host = HostSource(spans, self.crew)
        self._staged: StagedSource | None = None
        self.lanes = {
            name: Lanes(plan, numel, self.crew, compensated=compensated, spill=spill_dir)
            for name, plan in plans.items()
        }
        self.motion = Motion(self.crew)
        self._channel = ranks.channel()
        self._pipeline = Pipeline(
            self.lanes, self.motion, sum_over_ranks=self._channel.sum, world_size=ranks.world_size
        )

    @property
    def waits(self) -> Waits:
        """How often training has stood still for averaging."""
        return self._pipeline.waits

    def seconds_an_element(self) -> float:
        """Seconds that one update of a running mean takes for each element, measured on up to 4 million."""
        return seconds_an_element(self.crew, sum(span.numel for span in self._spans))

    def submit(self, masters: list[Tensor], *, step: int, rules: tuple[str, ...]) -> None:
        """Take the masters in for some rules, in the background; see `Pipeline.submit`."""
        self._pipeline.submit(self._source(masters), masters, step=step, rules=rules)

    def release_masters(self, *_: object) -> None:
        """Hook: return once the masters may be written to; see `Pipeline.release_masters`."""
        self._pipeline.release_masters()

    def raise_if_refused(self) -> None:
        """Raise what is wrong with the latest member; see `Pipeline.raise_if_refused`."""
        self._pipeline.raise_if_refused()

    def finish(self) -> None:
        """Return once every member is in; see `Pipeline.finish`."""
        self._pipeline.finish()

    def close(self) -> None:
        """Finish what is under way and let the threads end."""
        self._pipeline.close()
        self.crew.close()
        self._channel.close()

    def _source(self, masters: list[Tensor]) -> Source:
        """Where the masters are now: offloading may have moved them since the last member."""
        devices = set(map(DEVICE, masters)) - {torch.device("cpu")}
        if not devices:
            return self._host
        device = devices.pop()
        if self._staged is None:
            self._staged = StagedSource(
                self._spans,
                self.crew,
                device=device,
                api=torch.get_device_module(device),
                limit_bytes=STAGING_BYTES,
                lent=self._lent,
            )
        return self._staged


def seconds_an_element(crew: Crew, numel: int) -> float:
    """Measure the seconds that one update of a running mean takes for each element.

    Args:
        crew: does the arithmetic.
        numel: elements of a shard; up to `RATE_SAMPLE` of them are measured.
    """
    numel = min(RATE_SAMPLE, numel) or 1
    lanes = Lanes(_ONE_MEAN, numel, crew, compensated=True)
    source = HostSource([Span(0, 0, 0, numel)], crew)
    # Kept here: a source holds addresses, not tensors.
    masters = [torch.zeros(numel, dtype=torch.float32, device="cpu")]
    source.open(masters, None, lambda: None)
    tables = next(source.tables())
    seconds = []
    for _ in range(4):  # the first copies, and touches the memory
        updates = lanes.begin()
        begun = time.perf_counter()
        lanes.take(updates, tables)
        seconds.append(time.perf_counter() - begun)
        lanes.end(updates)
    return min(seconds[1:]) / numel
