"""Lanes in memory and on disk."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from swaft.averaging import host
from swaft.averaging.arithmetic import combine, reference_mean
from swaft.averaging.host import HostAverages
from swaft.averaging.host.machine import lane_bytes
from swaft.averaging.layout import Fragment, merge
from swaft.averaging.rules import EMA, LAWA, PowerEMA, Readout, Windows
from swaft.distributed import Ranks
from swaft.errors import AveragingError

pytestmark = pytest.mark.unit

NUMEL = 3000


def averages_of(
    plans, *, numel: int = NUMEL, spill_dir: Path | None = None, compensated: bool = True, device: str = "cpu"
):
    engine = SimpleNamespace(
        module=torch.nn.Module(),
        spans=merge([Fragment("a", 0, numel, 0, 0)]),
        numel=numel,
        ranks=Ranks(),
        masters_are_working=lambda: True,
        device=torch.device(device),
        stop=lambda: None,
    )
    return HostAverages(
        engine,
        plans,
        compensated=compensated,
        threads=2,
        spill_dir=spill_dir,
    )


def take(averages, members) -> None:
    for step, member in enumerate(members):
        averages.pipeline.raise_if_refused()
        averages.submit([member], step=step, rules=tuple(averages.lanes))
    averages.pipeline.finish()


def members(count: int, numel: int = NUMEL) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


def in_memory(averages: HostAverages, rule: str) -> int:
    """Bytes of a rule's lanes, but for those that are maps of files."""
    tensors = [
        each for lane in averages.lanes[rule].held().values() for each in (lane.mean, lane.compensation)
    ]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "(deleted)" in line]
    starts = {int(addresses.split("-")[0], 16) for addresses, *_ in maps}
    return sum(each.nbytes for each in tensors if each is not None and each.data_ptr() not in starts)


def test_blocks_on_disk_give_the_bits_of_blocks_in_memory(tmp_path, mapped_files):
    plan = Windows(blocks=6).plan(20)
    kept, spilled = averages_of({"w": plan}), averages_of({"w": plan}, spill_dir=tmp_path)
    for averages in (kept, spilled):
        take(averages, members(21))
    assert mapped_files(tmp_path) == 2 * 6
    assert in_memory(spilled, "w") == 0
    assert in_memory(kept, "w") == 6 * 6 * NUMEL
    for start, end in ((None, None), (7, 16), (17, None)):
        assert torch.equal(
            spilled.lanes["w"].shard(Readout(start=start, end=end)),
            kept.lanes["w"].shard(Readout(start=start, end=end)),
        )


def test_snapshots_on_disk_are_those_of_their_time(tmp_path, mapped_files):
    plan = PowerEMA(snapshots=4).plan(40)
    kept, spilled = averages_of({"p": plan}), averages_of({"p": plan}, spill_dir=tmp_path)
    for averages in (kept, spilled):
        take(averages, members(41))
    assert mapped_files(tmp_path)
    assert torch.equal(
        spilled.lanes["p"].shard(Readout(sigma_rel=0.12)), kept.lanes["p"].shard(Readout(sigma_rel=0.12))
    )


def test_a_window_is_the_mean_of_its_members_to_the_last_digits():
    averages, taken = averages_of({"w": Windows(blocks=8).plan(99)}), members(100)
    take(averages, taken)
    inside = torch.stack(taken[25:75])
    window = averages.lanes["w"].shard(Readout(start=25, end=74))
    error = (window.double() - inside.double().mean(0)).abs() / inside.abs().amax(0)
    assert error.max() <= 2**-24


def test_a_combination_has_the_bits_of_the_reference():
    averages, taken = averages_of({"lawa": LAWA(last=3).plan(9)}), members(5)
    take(averages, taken)
    expected = combine([(coefficient, m.mean, None) for coefficient, m in averages.lanes["lawa"].readout()])
    assert torch.equal(averages.lanes["lawa"].shard(), expected)
    assert torch.allclose(expected, torch.stack(taken[2:]).double().mean(0).float(), rtol=1e-6)


def test_the_plain_form_holds_no_compensation():
    averages = averages_of({"ema": EMA(decay=0.5).plan(9)}, compensated=False)
    take(averages, members(4))
    assert in_memory(averages, "ema") == 4 * NUMEL
    expected = reference_mean(members(4), [1, 0.5, 0.5, 0.5])
    assert torch.allclose(averages.lanes["ema"].shard(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize(
    "plan", [Windows(blocks=7).plan(30), PowerEMA(snapshots=5).plan(30), LAWA(last=4).plan(30)]
)
def test_no_more_memory_is_held_than_was_announced(plan, spilled, tmp_path):
    averages = averages_of({"rule": plan}, spill_dir=tmp_path if spilled else None)
    most = 0
    for step, member in enumerate(members(31)):
        averages.pipeline.raise_if_refused()
        averages.submit([member], step=step, rules=("rule",))
        averages.pipeline.finish()
        most = max(most, in_memory(averages, "rule"))
    assert most <= averages.host_bytes == lane_bytes(plan, NUMEL, compensated=True, spilled=spilled)
    assert most >= 0.5 * averages.host_bytes


def test_all_that_averages_take_in_host_memory_has_to_fit(monkeypatch):
    needed = []
    monkeypatch.setattr(host, "require_host_memory", lambda ranks, size: needed.append(size))
    averages = averages_of(
        {"ema": EMA().plan(9)}, device="meta"
    )  # as on a GPU: members pass through pinned blocks
    parts = (averages.host_bytes, averages.swap_bytes, averages.pinned_bytes)
    assert min(parts) > 0
    assert needed == [sum(parts)]
    averages.close()


def test_two_runs_with_one_folder_do_not_meet_and_leave_nothing_behind(tmp_path, mapped_files):
    plan = Windows(blocks=2).plan(9)
    one, two = (averages_of({"w": plan}, spill_dir=tmp_path) for _ in range(2))
    take(one, members(10))
    take(two, members(20)[10:])
    assert torch.allclose(one.lanes["w"].shard(), torch.stack(members(10)).mean(0), atol=1e-6)
    assert torch.allclose(two.lanes["w"].shard(), torch.stack(members(20)[10:]).mean(0), atol=1e-6)
    assert not list(tmp_path.iterdir()), "nothing to leave behind, however the processes end"
    one.close()
    two.close()
    del one, two
    gc.collect()
    assert not mapped_files(tmp_path)


def test_a_rank_that_owns_nothing_has_nothing_to_move(tmp_path):
    averages = averages_of({"w": Windows(blocks=2).plan(9)}, numel=0, spill_dir=tmp_path)
    take(averages, members(10, 0))
    assert averages.lanes["w"].shard().shape == (0,)


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AveragingError, match=r"spill_dir.*cannot be written"):
        averages_of({"w": Windows(blocks=2).plan(9)}, spill_dir=tmp_path / "file")


def test_a_disk_that_fails_later_ends_averaging_with_its_cause(tmp_path):
    averages = averages_of({"w": Windows(blocks=2).plan(9)}, spill_dir=tmp_path)
    tmp_path.rmdir()
    with pytest.raises(AveragingError, match="failed on this rank"):
        take(averages, members(10))


def test_nothing_is_allocated_once_the_lanes_are_there():
    numel = 4_000_000
    averages = averages_of({"ema": EMA(decay=0.5).plan(99)}, numel=numel)
    taken = members(2, numel)
    take(averages, taken)
    process = psutil.Process()
    before = process.memory_info().rss
    for step in range(2, 22):
        averages.pipeline.raise_if_refused()
        averages.submit([taken[step % 2]], step=step, rules=("ema",))
    averages.pipeline.finish()
    assert process.memory_info().rss - before < 2 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps memory out of forked processes")
def test_a_forked_process_holds_no_pages_of_the_averages_and_cannot_read_them():
    averages = averages_of({"ema": EMA(decay=0.5).plan(9)})
    take(averages, members(2))
    lanes = averages.lanes["ema"]
    [lane] = lanes.held().values()
    assert lane.mean.numpy().all()
    child = os.fork()
    if child == 0:
        held = lane.mean.numpy().any() or lane.compensation.view(torch.uint8).numpy().any()
        try:
            lanes.shard()
        except AveragingError as error:
            os._exit(7 if "this process is a fork" in str(error) and not held else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
