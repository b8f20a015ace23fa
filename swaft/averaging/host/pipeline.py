"""How a member gets from the masters into the lanes, behind the training thread.

    training thread                                    worker thread
    submit(masters)  ─────────────────────────────►    start the copies; all finite? all ranks at one step?
    forward, backward                                  (one message among the workers)
    release_masters(), before the optimizer writes     move the lanes piece by piece, release the masters
    raise_if_refused(), at the next applied step       close the member

No member is ever dropped: if the masters are still in use when the optimizer wants to write, the step waits, and
the wait is counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from swaft.averaging import native
from swaft.averaging.host.lanes import Lanes, Table
from swaft.averaging.host.machine import Workers
from swaft.averaging.host.source import Source
from swaft.errors import AveragingError

VERSION = attrgetter("_version")
WORD = 1 << 64
POLL = 1e-3
"""Seconds between two checks of whether the device still has work."""

Sum = Callable[[list[float]], list[float]]
"""Elementwise sum over the ranks."""


@dataclass
class Waits:
    """How often averaging blocked training: the training thread waited while the device was idle."""

    count: int = 0
    """Number of waits."""
    seconds: float = 0.0
    """Total seconds waited."""


@dataclass
class Member:
    """One averaging event in progress."""

    source: Source
    """Where its elements are read from."""
    masters: list[Tensor]
    """The master buffers; nothing may write to them before `released`."""
    ready: Any
    """Device event after which the masters are complete; None on the host."""
    step: int
    """The applied step whose weights these are."""
    rules: tuple[str, ...]
    """The rules that take it."""
    versions: list[int]
    """How often each buffer had been written to when the member was submitted."""
    released: threading.Event = field(default_factory=threading.Event)
    """Set when all copies are issued, or (on the host) all elements read."""
    judged: threading.Event = field(default_factory=threading.Event)
    """Set when all ranks know whether it may enter the average."""
    done: threading.Event = field(default_factory=threading.Event)
    """Set when it is in the lanes, or never will be."""
    refusal: AveragingError | None = None
    """Why it may not enter the average; the same on every rank."""


class ChangeCheck:
    """Checks that the weights change at all: compares the bits of each member with the first, until one differs.

    A silent no-op would be the worst possible fault.

    Args:
        workers: compute the sums.
    """

    def __init__(self, workers: Workers):
        self.seen = False
        self.members = 0
        self._workers = workers
        self._first: int | None = None
        self._sum = 0

    def take(self, tables: Sequence[Table]) -> None:
        """Add a piece of a member."""
        if not self.seen:
            self._sum += sum(int(part) for part in self._workers.run(native.checksum, tables))

    def end(self) -> None:
        """The member is complete."""
        self.members += 1
        if self._first is None:
            self._first = self._sum % WORD
        self.seen = self.seen or self._sum % WORD != self._first
        self._sum = 0

    def restart(self, *, moved: bool) -> None:
        """Start again, as after earlier members of which it is known whether they differed (``moved``)."""
        self.seen, self.members, self._first = moved, 0, None


class Pipeline:
    """One worker thread that takes members in, in the order of their submission.

    Args:
        lanes: by name of the rule.
        changes: checks whether members differ.
        sum_over_ranks: called by the worker once per member, on every rank.
        world_size: number of ranks.
    """

    def __init__(
        self, lanes: Mapping[str, Lanes], changes: ChangeCheck, *, sum_over_ranks: Sum, world_size: int
    ):
        self.waits = Waits()
        self._lanes, self._changes = lanes, changes
        self._sum, self._world_size = sum_over_ranks, world_size
        self._queue: queue.SimpleQueue[Member | None] = queue.SimpleQueue()
        self._latest: Member | None = None
        self._failure: Exception | None = None
        self._failure_raised = False
        self._thread = threading.Thread(target=self._work, name="swaft-average", daemon=True)
        self._thread.start()

    def submit(self, source: Source, masters: list[Tensor], *, step: int, rules: tuple[str, ...]) -> None:
        """Hand a member over; returns at once.

        The masters must not change before :meth:`release_masters`, and the next member must not be submitted before
        :meth:`raise_if_refused`.

        Raises:
            AveragingError: the worker has ended.
        """
        if not self._thread.is_alive():
            raise _ended()
        versions = list(map(VERSION, masters))
        self._latest = Member(source, masters, source.mark_ready(), step, rules, versions)
        self._queue.put(self._latest)

    def release_masters(self, *_: object) -> None:
        """Hook: block until the masters may be written to; called before anything writes to them."""
        if self._latest is not None:
            self._until(self._latest.released, self._latest.source)
            self._latest.source.order_after_copies()

    def raise_if_refused(self) -> None:
        """Wait for the ranks' verdict on the latest member, and raise if it was refused.

        The verdict is the same on every rank, so all of them raise in the same call.

        Raises:
            AveragingError: the member was not finite, the ranks are not at the same step, or a rank failed.
        """
        if self._latest is not None:
            self._until(self._latest.judged, self._latest.source)
            refusal, self._latest.refusal = self._latest.refusal, None
            if refusal is not None:
                raise refusal

    def finish(self) -> None:
        """Wait until every member is in the lanes.

        Raises:
            AveragingError: the latest member was refused, or (raised once) averaging failed on this rank. Earlier
                members are kept.
        """
        if self._latest is not None:
            self._until(self._latest.done)  # requested by the caller, so not counted as a wait
            self.raise_if_refused()
        if self._failure is not None and not self._failure_raised:
            self._failure_raised = True
            raise self._broken() from self._failure

    def close(self) -> None:
        """Process what has been submitted and end the thread."""
        self._queue.put(None)
        if self._thread is not threading.current_thread():  # garbage collection may call this on any thread
            self._thread.join(timeout=5.0)

    def _until(self, event: threading.Event, source: Source | None = None) -> None:
        """Wait for an event; given a member's source, the wait is counted while its device is idle."""
        if event.is_set():
            return
        queued = None if source is None else source.mark_ready()
        idle_since = time.perf_counter() if queued is None else None
        while not event.wait(timeout=1.0 if queued is None else POLL):
            # After `close`, or in a forked child, nothing is left to set it.
            if not self._thread.is_alive() and not event.is_set():
                raise _ended()
            if queued is not None and idle_since is None and queued.query():
                idle_since = time.perf_counter()
        if source is not None and idle_since is not None:
            self.waits.count += 1
            self.waits.seconds += time.perf_counter() - idle_since

    @torch.no_grad()
    def _work(self) -> None:
        while (member := self._queue.get()) is not None:
            try:
                self._judge(member)
                if member.refusal is None:
                    self._take_in(member)
            except Exception as error:  # whatever it is, training must neither hang nor continue unaware
                self._failure = error  # the next member's message reports it to the other ranks
                if not member.judged.is_set():
                    member.refusal = self._broken()
            finally:
                member.masters = []
                member.source.close()
                for event in (member.done, member.judged, member.released):
                    event.set()
                del member  # an idle thread must not keep it alive

    def _judge(self, member: Member) -> None:
        finite = False
        try:
            member.source.open(member.masters, member.ready, lambda: self._release(member))
            finite = member.source.all_finite()
        except Exception as error:
            self._failure = error
        healthy = self._failure is None
        step = member.step
        finites, healthies, steps, squares = self._sum([finite, healthy, step, step * step])
        world_size = self._world_size
        if healthies < world_size:
            member.refusal = self._broken()
        elif steps * steps != world_size * squares:  # equal only if all steps are
            member.refusal = AveragingError(
                f"this rank has taken {step} optimizer steps and others a different number ({steps / world_size:g} "
                "on average); expected the same on every rank"
            )
        elif finites < world_size:
            member.refusal = AveragingError(
                f"the weights after step {step} are not finite on {world_size - int(finites)} of {world_size} "
                "ranks, and did not enter the average, which keeps the members it has. Lower "
                "train.learning_rate or set train.max_grad_norm"
            )
        member.judged.set()

    def _take_in(self, member: Member) -> None:
        taking = [self._lanes[name] for name in member.rules]
        updates = [lanes.begin() for lanes in taking]
        for tables in member.source.tables():
            for lanes, each in zip(taking, updates, strict=True):
                lanes.take(each, tables)
            self._changes.take(tables)
        self._changes.end()
        for lanes, each in zip(taking, updates, strict=True):
            lanes.end(each)

    def _release(self, member: Member) -> None:
        if list(map(VERSION, member.masters)) != member.versions:
            raise AveragingError(
                f"the weights after step {member.step} were written to while they were being averaged, by neither "
                "the optimizer, nor `model.load_state_dict`, nor a swap; call `averager.wait()` before weights are "
                "changed in another way"
            )
        member.released.set()

    def _broken(self) -> AveragingError:
        if self._failure is None:
            return AveragingError(
                "averaging failed on another rank, so no more weights are averaged; see the log of that rank"
            )
        error = AveragingError(
            f"averaging failed on this rank: {type(self._failure).__name__}: {self._failure}; no more weights are "
            "averaged"
        )
        for note in getattr(self._failure, "__notes__", ()):  # a recipe has its own for lost ranks
            error.add_note(note)
        return error


def _ended() -> AveragingError:
    return AveragingError(
        "the averager's thread has ended, because it was closed or this process is a fork of the training process; "
        "attach a new averager in the training process"
    )
