"""Members on their way: never torn, never dropped, judged alike on every rank, and behind the training thread."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from swaft.averaging.arithmetic import reference_mean
from swaft.averaging.host.lanes import Lanes
from swaft.averaging.host.machine import Workers
from swaft.averaging.host.pipeline import ChangeCheck, Pipeline
from swaft.averaging.host.source import HostSource, StagedSource, ring_of
from swaft.averaging.layout import Fragment, merge
from swaft.averaging.rules import EMA, SWA
from swaft.errors import AveragingError, LayoutError

pytestmark = pytest.mark.unit

FRAGMENTS = [Fragment("a", 0, 700, 0, 0), Fragment("b", 0, 300, 0, 710), Fragment("c", 0, 200, 1, 3)]
SPANS = merge(FRAGMENTS)


def masters(seed: int) -> list[torch.Tensor]:
    """Two buffers, with padding that holds no numbers."""
    generator = torch.Generator().manual_seed(seed)
    buffers = [torch.randn(1010, generator=generator), torch.randn(203, generator=generator)]
    buffers[0][700:710] = torch.nan
    return buffers


def owned(buffers: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([buffers[f.buffer][f.offset : f.offset + f.numel] for f in FRAGMENTS])


class LateDevice:
    """A device whose copies happen at the last moment that events and streams allow.

    So a block read before its copy, or masters written to before it, show in the result.
    """

    def __init__(self):
        self.pending, self.done, self.lock = [], 0, threading.RLock()
        self.busy = threading.Event()
        device = self

        class Event:
            position = 0

            def record(self, stream=None):
                self.position = len(device.pending)

            def synchronize(self):
                device.catch_up(self.position)

            def query(self):
                return not device.busy.is_set()

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_event(self, event):
                device.catch_up(event.position)

        self.Event, self.Stream = Event, Stream
        self.devices = []  # (thread, device) of every `set_device`

    def set_device(self, device):
        self.devices.append((threading.current_thread().name, device))

    def current_stream(self, device=None):
        return self.Stream()

    @contextmanager
    def stream(self, stream):
        assert self.devices, "a thread begins on card 0, and the stream may be another's"
        yield

    def copy(self, targets, sources, non_blocking):
        assert non_blocking
        self.pending.append(lambda: [t.copy_(s) for t, s in zip(targets, sources, strict=True)])

    def catch_up(self, position: int) -> None:
        with self.lock:
            while self.done < position:
                self.pending[self.done]()
                self.done += 1


@contextmanager
def pipeline(kind: str, *, plans=None, sum_over_ranks=list, world_size=1, threads=2, limit_bytes=1 << 22):
    """A pipeline and its source, on the host or through the staging ring."""
    workers = Workers(threads)
    lanes = {
        name: Lanes(plan, 1200, workers, compensated=True)
        for name, plan in (plans or {"swa": SWA(start=0).plan(99)}).items()
    }
    device = LateDevice()
    if kind == "host":
        source = HostSource(SPANS, workers)
    else:
        with mock.patch("swaft.averaging.host.source.MIN_BLOCK_NUMEL", 64):
            source = StagedSource(
                SPANS, workers, device=torch.device("cpu"), api=device, limit_bytes=limit_bytes
            )
    line = Pipeline(lanes, ChangeCheck(workers), sum_over_ranks=sum_over_ranks, world_size=world_size)
    with mock.patch.object(torch, "_foreach_copy_", device.copy):
        try:
            yield line, source, lanes
        finally:
            line.close()
            workers.close()


KINDS = [("host", 0), ("ring holds the shard", 1 << 22), ("ring holds a fifth of the shard", 8 * 4 * 64)]


@pytest.mark.parametrize(("kind", "limit_bytes"), KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_member_enters_whole_though_the_optimizer_writes_over_it_at_once(kind, limit_bytes, threads):
    members = [masters(seed) for seed in range(6)]
    live = [buffer.clone() for buffer in members[0]]
    with pipeline(kind, threads=threads, limit_bytes=limit_bytes) as (line, source, lanes):
        for step, member in enumerate(members):
            line.release_masters()
            for buffer, values in zip(live, member, strict=True):
                buffer.copy_(values)
            line.raise_if_refused()
            line.submit(source, live, step=step, rules=("swa",))
        line.finish()
        plan = SWA(start=0).plan(99)
        expected = reference_mean([owned(m) for m in members], [1 / (n + 1) for n in range(6)])
        assert plan.num_members == 100
        assert torch.equal(lanes["swa"].shard(), expected)
        assert lanes["swa"].count == 6


def test_after_a_restart_members_are_compared_with_the_first_one_after_it():
    workers = Workers(1)
    source, changes = HostSource(SPANS, workers), ChangeCheck(workers)

    def take(member):
        source.open(member, None, lambda: None)
        for tables in source.tables():
            changes.take(tables)
        changes.end()

    take(masters(0))
    changes.restart(moved=False)
    take(masters(1))
    take(masters(1))
    assert (changes.seen, changes.members) == (False, 2)
    take(masters(2))
    assert changes.seen
    workers.close()


def test_a_member_is_looked_at_and_copied_once_the_step_that_writes_it_has_ended_on_the_device():
    with pipeline("staged") as (line, source, lanes):
        live, after = [torch.full_like(buffer, torch.nan) for buffer in masters(0)], masters(0)

        def ended(ready):
            assert isinstance(ready, source._api.Event)
            for buffer, values in zip(live, after, strict=True):
                buffer.data.copy_(values)  # .data: unseen by the count of writes

        source._stream.wait_event = ended
        line.submit(source, live, step=0, rules=("swa",))
        line.finish()
        assert torch.equal(lanes["swa"].shard(), owned(after))


def test_a_member_that_is_written_over_without_release_would_be_torn():
    """The control: the late device does show a missing wait."""
    with pipeline("staged", limit_bytes=8 * 4 * 64) as (line, source, lanes):
        live = masters(0)
        expected = owned(live).clone()
        held = threading.Event()
        line._sum = lambda values: held.wait(10) and values
        line.submit(source, live, step=0, rules=("swa",))
        live[1].data.fill_(7.0)  # .data: unseen by the count of writes
        held.set()
        line.finish()
        assert not torch.equal(lanes["swa"].shard(), expected)


@pytest.mark.parametrize("kind", ["host", "staged"])
def test_weights_that_somebody_writes_to_while_they_are_read_are_an_error(kind):
    held = threading.Event()
    with pipeline(kind, limit_bytes=8 * 4 * 64, sum_over_ranks=lambda v: held.wait(10) and v) as (
        line,
        source,
        lanes,
    ):
        live = masters(0)
        line.submit(source, live, step=3, rules=("swa",))
        live[1].clamp_(-1, 1)
        held.set()
        with pytest.raises(
            AveragingError, match=r"written to while they were being averaged.*averager\.wait"
        ):
            line.finish()
        with pytest.raises(AveragingError, match="only in part"):
            lanes["swa"].shard()


def test_a_closed_pipeline_takes_nothing_and_lets_nobody_wait_for_ever():
    with pipeline("host") as (line, source, _):
        line.submit(source, masters(0), step=0, rules=("swa",))
        line.close()
        line.release_masters()
        with pytest.raises(AveragingError, match="thread has ended"):
            line.submit(source, masters(1), step=1, rules=("swa",))


def test_a_forked_child_that_inherits_a_member_on_its_way_is_told_so():
    held = threading.Event()
    with pipeline("host", sum_over_ranks=lambda values: held.wait(10) and values) as (line, source, _):
        line.submit(source, masters(0), step=0, rules=("swa",))
        child = os.fork()
        if child == 0:
            try:
                line.release_masters()
            except AveragingError:
                os._exit(7)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        held.set()
        assert os.waitstatus_to_exitcode(status) == 7
        line.finish()


def test_several_rules_take_from_one_copy():
    plans = {"swa": SWA(start=0).plan(9), "ema": EMA(decay=0.5).plan(9)}
    members = [masters(seed) for seed in range(3)]
    with pipeline("staged", plans=plans) as (line, source, lanes):
        copies = mock.Mock(side_effect=source._copy)
        source._copy = copies
        for step, member in enumerate(members):
            line.raise_if_refused()
            line.submit(source, member, step=step, rules=("swa", "ema") if step != 1 else ("ema",))
            line.finish()
        assert copies.call_count == 3 * len(source._chunks)
        values = [owned(member) for member in members]
        assert torch.equal(lanes["swa"].shard(), reference_mean([values[0], values[2]], [1, 1 / 2]))
        assert torch.equal(lanes["ema"].shard(), reference_mean(values, [1, 1 / 2, 1 / 2]))


def test_the_training_thread_waits_only_when_it_must_and_the_wait_is_counted():
    held = threading.Event()
    with pipeline("host", sum_over_ranks=lambda values: held.wait(10) and values) as (line, source, _):
        line.release_masters()
        assert line.waits.count == 0
        line.submit(source, masters(0), step=0, rules=("swa",))
        threading.Timer(0.05, held.set).start()
        line.release_masters()
        assert line.waits.count == 1
        assert line.waits.seconds > 0.03
        line.finish()
        line.release_masters()
        assert line.waits.count == 1


def test_a_wait_beside_a_busy_device_is_not_counted_and_one_beside_an_idle_device_is():
    held = threading.Event()
    with pipeline("staged", sum_over_ranks=lambda values: held.wait(10) and values) as (line, source, _):
        for busy, expected in ((True, 0), (False, 1)):
            (source._api.busy.set if busy else source._api.busy.clear)()
            held.clear()
            line.submit(source, masters(0), step=0, rules=("swa",))
            threading.Timer(0.1, held.set).start()
            line.raise_if_refused()
            assert line.waits.count == expected
            line.finish()
        assert 0.03 < line.waits.seconds < 5


def test_the_thread_that_copies_is_on_the_device_of_the_masters():
    with pipeline("staged") as (line, source, _):
        line.submit(source, masters(0), step=0, rules=("swa",))
        line.finish()
        assert set(source._api.devices) == {("swaft-average", torch.device("cpu"))}


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 2.0**126])  # the last could overflow
@pytest.mark.parametrize("kind", ["host", "staged"])
def test_a_member_that_is_not_finite_is_refused_and_the_average_stays(kind, value):
    with pipeline(kind) as (line, source, lanes):
        good, bad = masters(0), masters(1)
        bad[1][5] = value
        line.submit(source, good, step=0, rules=("swa",))
        line.raise_if_refused()
        line.submit(source, bad, step=1, rules=("swa",))
        with pytest.raises(AveragingError, match=r"after step 1 are not finite on 1 of 1 ranks"):
            line.raise_if_refused()
        line.finish()
        assert torch.equal(lanes["swa"].shard(), owned(good))
        line.submit(source, masters(2), step=2, rules=("swa",))
        line.finish()
        assert lanes["swa"].count == 2


def test_a_member_that_another_rank_refuses_is_refused_here():
    def other_rank_found_nan(values):
        finite, healthy, step, square = values
        return [finite + 0, healthy + 1, 2 * step, 2 * square]

    with pipeline("host", sum_over_ranks=other_rank_found_nan, world_size=2) as (line, source, lanes):
        line.submit(source, masters(0), step=4, rules=("swa",))
        with pytest.raises(AveragingError, match=r"not finite on 1 of 2 ranks"):
            line.finish()
        assert lanes["swa"].count == 0


@pytest.mark.parametrize("others", [(5, 5), (3, 5), (4, 5)])
def test_ranks_at_different_steps_are_refused_on_all_of_them_alike(others):
    """Steps 3, 4, 5 have the mean of 4, 4, 4; the rank at 4 must notice too."""

    def three_ranks(values):
        sums = [1 + 2, 1 + 2, 0.0, 0.0]
        for step in (values[2], *others):
            sums[2] += step
            sums[3] += step * step
        return sums

    with pipeline("host", sum_over_ranks=three_ranks, world_size=3) as (line, source, _):
        line.submit(source, masters(0), step=4, rules=("swa",))
        with pytest.raises(AveragingError, match="expected the same on every rank"):
            line.raise_if_refused()


def test_a_fault_on_this_rank_ends_averaging_with_its_cause_and_does_not_hang():
    with pipeline("host") as (line, source, lanes):
        line.submit(source, masters(0), step=0, rules=("swa",))
        line.finish()
        line.submit(source, [torch.zeros(3)], step=1, rules=("swa",))
        line.release_masters()
        with pytest.raises(AveragingError, match=r"failed on this rank: LayoutError"):
            line.raise_if_refused()
        with pytest.raises(AveragingError) as caught:
            line.finish()
        assert isinstance(caught.value.__cause__, LayoutError)
        line.finish()  # told once; what was averaged before can be had
        assert torch.equal(lanes["swa"].shard(), owned(masters(0)))


def test_a_fault_after_the_verdict_reaches_the_other_ranks_with_the_next_member():
    messages, full = [], OSError("no space left")
    full.add_note("name another disk")
    with pipeline("host", sum_over_ranks=lambda v: messages.append(v) or v) as (line, source, lanes):
        with mock.patch.object(lanes["swa"], "take", side_effect=full):
            line.submit(source, masters(0), step=0, rules=("swa",))
            line.raise_if_refused()  # all ranks had agreed on this one
            line._latest.done.wait()
        line.submit(source, masters(1), step=1, rules=("swa",))
        with pytest.raises(AveragingError, match="no space left; no more") as found:
            line.raise_if_refused()
        assert found.value.__notes__ == ["name another disk"]
        assert [healthy for _, healthy, _, _ in messages] == [True, False]


def test_a_fault_on_another_rank_is_heard_of_here():
    def broken_elsewhere(values):
        return [values[0], values[1], 2 * values[2], 2 * values[3]]

    with pipeline("host", sum_over_ranks=broken_elsewhere, world_size=2) as (line, source, lanes):
        line.submit(source, masters(0), step=1, rules=("swa",))
        with pytest.raises(AveragingError, match="failed on another rank"):
            line.raise_if_refused()
        assert lanes["swa"].count == 0


@pytest.mark.parametrize(
    "buffers",
    [
        [torch.zeros(1010)],
        [torch.zeros(1010), torch.zeros(202)],
        [torch.zeros(1010), torch.zeros(203).double()],
    ],
)
def test_masters_rebuilt_with_another_geometry_are_refused_and_never_read(buffers):
    with pipeline("host") as (line, source, _):
        line.submit(source, buffers, step=0, rules=("swa",))
        with pytest.raises(AveragingError, match=r"master buffer 1 is"):
            line.finish()


def test_a_rank_that_owns_nothing_takes_part_all_the_same():
    workers = Workers(2)
    lanes = {"swa": Lanes(SWA(start=0).plan(9), 0, workers, compensated=True)}
    line = Pipeline(lanes, ChangeCheck(workers), sum_over_ranks=list, world_size=1)
    for source in (
        HostSource([], workers),
        StagedSource([], workers, device=torch.device("cpu"), api=LateDevice(), limit_bytes=1 << 22),
    ):
        line.submit(source, [], step=0, rules=("swa",))
        line.release_masters()
        line.finish()
    assert lanes["swa"].count == 2
    assert lanes["swa"].shard().numel() == 0
    line.close()


@pytest.mark.parametrize(
    ("numel", "block_numel", "blocks"),
    [(0, 1 << 16, 1), (1000, 1 << 16, 1), (10**6, 1 << 17, 8), (10**8, 1 << 24, 6), (10**10, 1 << 24, 8)],
)
def test_the_ring_is_made_of_powers_of_two_and_bounded(numel, block_numel, blocks):
    assert ring_of(numel, 1 << 29) == (block_numel, blocks)
    assert 4 * block_numel * blocks <= 1 << 29
