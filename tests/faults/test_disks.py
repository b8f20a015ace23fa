"""Disks that are full or turn read-only while a checkpoint is written: one error on every rank, nothing lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_inputs import save_inputs
from faults import ENGINES, Zygote, differences, ending, zygote

from swaft.distributed import Ranks
from swaft.training.checkpoints import choose_checkpoint, find_checkpoints

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def started() -> Iterator[Zygote]:
    with zygote() as process:
        yield process


@pytest.fixture(scope="module")
def run_inputs(tmp_path_factory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("disk-inputs"))


def mount(*words: str) -> str:
    """Call mount; returns what is wrong."""
    return subprocess.run(["mount", *words], capture_output=True, text=True, timeout=20).stderr.strip()


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small file system, made larger by `mount -o remount`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if wrong := mount("-t", "tmpfs", "-o", "size=1200k", "none", str(folder)):
        pytest.skip(f"no file system can be mounted here: {wrong}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero2", "zero3"))]
)
def test_a_full_disk_ends_every_rank_with_one_error_and_costs_no_older_checkpoint(
    started, run_inputs, tmp_path, disk, engine
):
    unbroken = tmp_path / "unbroken"
    assert set(started.run(ENGINES[engine], unbroken, run_inputs)["codes"]) == {0}
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
    assert not differences(ending(run), ending(unbroken))


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
