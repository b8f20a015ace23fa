"""One rank's averages in host memory, behind the training thread: lanes, threads that move them, a pipeline.

And what they will take, and what rounding would do to a mean over the whole run, before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

    def forecast(self) -> Forecast:
        """What the run's averages take on this rank; the optimizer's peak rate decides the plain form's error."""
        plans = {name: lanes.plan for name, lanes in self.lanes.items()}
        groups, elements = self._engine.inner_optimizer.param_groups, self._engine.numel
        rate = float(max(group.get("initial_lr", group.get("lr", 0.0)) for group in groups))
        events = {
            step
            for plan in plans.values()
            for step in range(plan.first_step, plan.total_steps + 1, plan.every)
        }
        updates = max(sum(len(plan.updates(1)) for plan in plans.values()), 1)
        return Forecast(
            elements=elements,
            events=len(events),
            host_bytes=self.host_bytes,
            pinned_bytes=self.pinned_bytes,
            copied_bytes=4 * elements if self.pinned_bytes else 0,
            threads=self.workers.threads,
            seconds=updates * elements * seconds_an_element(self.workers, elements),
            plain_errors={
                name: simulate(plan, plain_mean(), learning_rate=rate)
                for name, plan in plans.items()
                if plan.lanes == (True,) and not self.compensated and rate > 0
            },
        )

    def close(self) -> None:
        """Finish what is under way and let the threads end."""
        self._engine.stop()
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
        workers.run(native.update, [(*each, mean, words, 0.5) for each in tables])
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:]) / numel


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
