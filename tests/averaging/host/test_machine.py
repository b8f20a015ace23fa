from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
import torch

from swaft import WeightAverager
from swaft.averaging.host import machine
from swaft.averaging.host.machine import Workers, cores_near, default_threads, parse_cores
from swaft.averaging.rules import EMA, LAWA, SWA
from swaft.distributed import Ranks
from swaft.errors import AveragingError, ConfigError

pytestmark = pytest.mark.unit


def test_a_running_mean_takes_six_bytes_an_element_and_four_in_the_plain_form():
    plan = SWA(start=0).plan(100)
    assert machine.lane_bytes(plan, 1000, compensated=True, spilled=False) == 6000
    assert machine.lane_bytes(plan, 1000, compensated=False, spilled=False) == 4000
    assert machine.lane_bytes(EMA().plan(100), 1000, compensated=True, spilled=True) == 6000


@pytest.mark.parametrize(
    ("rules", "stashed", "size"),
    [
        ([EMA()], False, 4),  # an export of the last weights
        ([EMA()], True, 4),
        ([EMA(), LAWA(last=3)], False, 4),
        ([EMA(), LAWA(last=3)], True, 8),
    ],
)
def test_what_a_swap_and_an_export_take_is_counted(rules, stashed, size):
    plans = [rule.plan(100) for rule in rules]
    assert machine.swap_bytes(plans, 1000, stashed=stashed) == 1000 * size


def test_averages_that_leave_no_room_for_a_swap_are_refused_at_the_start(monkeypatch):
    weight = torch.nn.Linear(1000, 1, bias=False)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
    monkeypatch.setattr(machine, "available_bytes", lambda: 9_999)
    with pytest.raises(AveragingError, match="averaging would take"):
        WeightAverager(weight, optimizer, rule=EMA(), total_steps=99)
    monkeypatch.setattr(machine, "available_bytes", lambda: 10_000)
    WeightAverager(weight, optimizer, rule=EMA(), total_steps=99).close()


def test_what_does_not_fit_is_refused_with_what_there_is(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 3 * 2**30)
    machine.require_host_memory(Ranks(), 3 * 2**30)
    with pytest.raises(
        AveragingError, match=r"3\.1 GiB .* where 3\.0 GiB are left.*averaging\.precision=plain"
    ):
        machine.require_host_memory(Ranks(), int(3.1 * 2**30))


def test_all_ranks_of_a_node_share_its_memory():
    class FourRanks(Ranks):
        def gather(self, value):
            return [
                ("left", 2**30, 3 * 2**30),
                ("left", 2**30, 2**30),
                ("right", 2**30, 2**31),
                ("right", 1, 2**30),
            ]

    with pytest.raises(AveragingError, match=r"2\.0 GiB of host memory on left \(2 ranks\), where 1\.0 GiB"):
        machine.require_host_memory(FourRanks(), 2**30)


@pytest.mark.parametrize(
    ("line", "limit_file", "use_file", "cache_line"),
    [
        ("0::/job/step", "memory.max", "memory.current", "inactive_file 100"),
        (
            "5:cpu,memory:/job/step",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file 100",
        ),
    ],
)
def test_the_tightest_control_group_counts_and_page_cache_does_not(
    tmp_path, monkeypatch, line, limit_file, use_file, cache_line
):
    root = tmp_path if line.startswith("0::") else tmp_path / "memory"
    own = root / "job" / "step"
    own.mkdir(parents=True)
    for folder, limit in ((own, "max"), (own.parent, "1000"), (root, "9000")):
        (folder / limit_file).write_text(limit)
        (folder / use_file).write_text("700")
        (folder / "memory.stat").write_text(f"anon 600\n{cache_line}\n")
    proc = tmp_path / "cgroup"
    proc.write_text(f"{line}\n1:name=systemd:/elsewhere\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", proc)
    assert machine.available_bytes() == 1000 - 700 + 100


def test_a_machine_without_control_groups_has_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "absent")
    assert machine.available_bytes() > 0


def test_the_kernels_list_of_cores_is_understood():
    assert parse_cores("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert parse_cores("") == set()


def test_threads_are_half_of_a_ranks_cores_and_at_least_one(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert default_threads() == 8
    assert cores_near(None) == set(range(64))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("0-3,8\n", {0, 1, 2, 3, 8}),
        ("64-127\n", set(range(64))),
        ("\n", set(range(64))),
        (None, set(range(64))),
    ],
    ids=["near", "near ones are not allowed", "none listed", "no list"],
)
def test_threads_stay_on_the_cores_near_a_card_where_those_are_known(monkeypatch, tmp_path, listed, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(machine, "PCI_DEVICES", tmp_path)
    if listed is not None:
        (tmp_path / "0000:1b:00.0").mkdir()
        (tmp_path / "0000:1b:00.0" / "local_cpulist").write_text(listed)
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=27, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert cores_near(torch.device("cuda:1")) == expected


def test_a_card_whose_address_torch_does_not_tell_is_near_every_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="a card"))
    assert cores_near(torch.device("cuda")) == {0, 1}


def test_when_one_part_fails_no_other_is_still_running():
    ended = []

    def work(seconds):
        if not seconds:
            raise ValueError("failed")
        time.sleep(seconds)
        ended.append(seconds)

    with pytest.raises(ValueError, match="failed"):
        Workers(2).run(work, [(0.0,), (0.05,)])
    assert ended == [0.05]


def test_a_crew_of_nobody_is_refused():
    with pytest.raises(ConfigError, match="threads is 0, expected a whole number"):
        Workers(0)
