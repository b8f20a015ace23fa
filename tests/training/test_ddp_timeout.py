from __future__ import annotations

import resource
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from swaft import distributed
from swaft.distributed import Ranks, _gloo_group
from swaft.training.config import TrainConfig
from swaft.training.launch.accelerator import process_group

pytestmark = pytest.mark.unit


@pytest.fixture
def default_group(monkeypatch) -> Iterator[None]:
    """A process group of this process alone, as a recipe starts it with a time limit of 17 s."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))  # put back afterwards
    settings = process_group(TrainConfig(output_dir="unused", ddp_timeout=17), on_cpu=True)
    dist.init_process_group(**settings.to_kwargs(), rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def limit(group) -> timedelta:
    return group._get_backend(group._device_types[0]).options._timeout


def test_every_group_waits_as_long_as_the_settings_say_whoever_makes_it(default_group):
    assert limit(dist.group.WORLD) == timedelta(seconds=17)
    assert limit(dist.new_group()) == timedelta(seconds=17)  # as DeepSpeed makes its own
    assert limit(_gloo_group()) == timedelta(seconds=17)


def test_ranks_wait_for_each_other_on_the_way_out_no_longer_than_at_any_other_time(default_group):
    assert limit(_gloo_group(at_most=timedelta(seconds=5))) == timedelta(seconds=5)
    assert limit(_gloo_group(at_most=timedelta(seconds=60))) == timedelta(seconds=17)


def test_ranks_wait_for_the_one_that_writes_a_model_longer_than_for_a_collective(default_group):
    assert limit(_gloo_group(at_least=timedelta(hours=6))) == timedelta(hours=6)


@pytest.fixture
def two_ranks(monkeypatch) -> SimpleNamespace:
    """Rank 0 of two, whose groups are their limits, and the groups it has used."""
    made, used = [], []
    monkeypatch.setattr(distributed, "_gloo_group", lambda **limits: made.append(limits) or limits)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for call in ("send", "recv", "all_gather_object"):
        monkeypatch.setattr(dist, call, lambda *_, group, **__: used.append(group))
    return SimpleNamespace(ranks=Ranks(), made=made, used=used)


def test_weights_on_their_way_to_a_slow_disk_have_the_time_of_the_disk(two_ranks):
    patient = {"at_least": distributed.PATIENCE}
    assert patient in two_ranks.made  # now, and not at the end of the run
    two_ranks.ranks.send(torch.zeros(1), to=1)
    two_ranks.ranks.receive(torch.zeros(1), source=1)
    with two_ranks.ranks.together("no room", patiently=True):
        pass
    assert two_ranks.used == [patient] * 3
    with two_ranks.ranks.together("no room"):
        pass
    assert two_ranks.used[3] == {}


def test_a_rank_that_waits_in_vain_says_which_calls_every_rank_must_make(two_ranks, monkeypatch):
    def times_out(*_, **__):
        raise RuntimeError("Timed out waiting 1800000ms for recv operation to complete")

    monkeypatch.setattr(dist, "all_gather_object", times_out)
    with pytest.raises(RuntimeError, match="Timed out") as found:
        two_ranks.ranks.gather(None)
    assert "every rank to make the same calls of the averager" in found.value.__notes__[0]


def test_more_ranks_than_a_shells_limit_of_open_files_can_meet(request):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1000, before[1]), before[1]))
    request.getfixturevalue("two_ranks")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])


@pytest.mark.parametrize("seconds", [600, 1800])
def test_a_limit_that_is_somebodys_default_is_handed_on_as_well(seconds, monkeypatch):
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, None)
    process_group(TrainConfig(output_dir="unused", ddp_timeout=seconds), on_cpu=False)
    assert distributed_c10d._get_default_timeout("gloo") == timedelta(seconds=seconds)
