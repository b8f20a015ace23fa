"""Disks that are full or turn read-only while a checkpoint is written: one error on every rank, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import ENGINES, differences, ending
from small_disks import file_system, mount

from swaft.distributed import Ranks
from swaft.training.run.checkpoints import choose_checkpoint, find_checkpoints

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(600)]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small file system, made larger by `mount -o remount`."""
    with file_system(tmp_path / "disk", size="1200k") as wrong:
        if wrong:
            pytest.skip(wrong)
        yield tmp_path / "disk"


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero2", "zero3"))]
)
def test_a_full_disk_ends_every_rank_with_one_error_and_costs_no_older_checkpoint(
    started, run_inputs, unbroken, tmp_path, disk, engine
):
    run = disk / "run"
    log = tmp_path / "run.log"
    filled = disk / "filler"
    filled.write_bytes(b"x" * 300_000)  # so that a third checkpoint beside two does not fit
    found = started.run(ENGINES[engine], run, run_inputs, log=str(log))
    said = log.read_text()
    assert found["codes"] == [1, 1], said[-3000:]
    assert not found["hung"]
    assert "No space left on device" in said or "could not be written" in said, said[-3000:]
    assert "Traceback" not in said, said[-6000:]
    whole = find_checkpoints(run)
    assert whole
    assert find_checkpoints(run, complete=False) == []
    assert choose_checkpoint("auto", run, Ranks())
    filled.unlink()
    assert not mount("-o", "remount,size=20m", str(disk))
    assert set(started.run(ENGINES[engine], run, run_inputs, log=str(log))["codes"]) == {0}, log.read_text()[
        -3000:
    ]
    assert not differences(ending(run), unbroken(engine)[0])


def test_a_disk_that_turns_read_only_ends_every_rank_with_one_error(started, run_inputs, tmp_path, disk):
    run, log = disk / "run", tmp_path / "run.log"
    assert not mount("-o", "remount,size=20m", str(disk))
    settings = ("train.max_steps=4000", "train.save_steps=5", "eval.eval_steps=null", "eval.keep_best=none")
    found = started.run(
        ENGINES["ddp"], run, run_inputs, *settings,
        log=str(log), command=["mount", "-o", "remount,ro", str(disk)], at_log="checkpoint-10 saved",
    )  # fmt: skip
    said = log.read_text()
    assert found["codes"] == [1, 1], said[-3000:]
    assert "Read-only file system" in said
    assert len(find_checkpoints(run)) == 2
    assert choose_checkpoint("auto", run, Ranks())
