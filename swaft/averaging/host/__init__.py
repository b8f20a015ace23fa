"""One rank's averages in host memory, behind the training thread: lanes, threads that move them, a pipeline."""

from __future__ import annotations

import time
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swaft.averaging import native
from swaft.averaging.engines import Engine
from swaft.averaging.host.lanes import Lanes, require_writable
from swaft.averaging.host.machine import Workers, lane_bytes, require_host_memory
from swaft.averaging.host.pipeline import ChangeCheck, Pipeline
from swaft.averaging.host.source import HostSource, Source, StagedSource, ring_bytes, shares, table
from swaft.averaging.layout import Span
from swaft.averaging.rules import Plan

STAGING_BYTES = 1 << 29
"""Most pinned memory a rank takes: 512 MiB."""
RATE_SAMPLE = 1 << 22
"""Elements on which the rate of the arithmetic is measured."""
DEVICE = attrgetter("device")


class HostAverages:
    """The averages of one rank's shard, in its host memory (creating them is collective).

    Args:
        engine: whose masters.
        plans: by name of the rule.
        compensated: keep running means to 32 bits (6 bytes an element) instead of 24 (4 bytes).
        threads: as of `WeightAverager`.
        spill_dir: likewise; finished lanes move there, in files without a name, which end with the process.

    Raises:
        AveragingError: on every rank, where a node's memory is too small.
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
        self.host_bytes = sum(
            lane_bytes(plan, numel, compensated=compensated, spilled=spill_dir is not None)
            for plan in plans.values()
        )
        self.pinned_bytes = 0 if device.type == "cpu" else ring_bytes(numel, STAGING_BYTES)
        require_host_memory(ranks, self.host_bytes + self.pinned_bytes)
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
        """Take the masters in for some rules, in the background; see `Pipeline.submit`."""
        self.pipeline.submit(self._source(masters), masters, step=step, rules=rules)

    def close(self) -> None:
        """Finish what is under way and let the threads end."""
        self.pipeline.close()
        self.workers.close()
        self._channel.close()

    def _source(self, masters: list[Tensor]) -> Source:
        """Where the masters are now: offloading may have moved them since the last member."""
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
    """Measure the seconds that one update of a running mean takes for each element.

    Args:
        workers: do the arithmetic.
        numel: elements of a shard; up to `RATE_SAMPLE` of them are measured.
    """
    numel = min(RATE_SAMPLE, numel) or 1
    member, mean, words = np.zeros(numel, np.float32), np.zeros(numel, np.float32), np.zeros(numel, np.uint16)
    tables = [table(part, [member.ctypes.data]) for part in shares([Span(0, 0, 0, numel)], workers)]
    seconds = []
    for _ in range(4):  # the first touches the memory
        begun = time.perf_counter()
        workers.run(native.update, [(*each, mean, words, np.float32(0.5)) for each in tables])
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:]) / numel
