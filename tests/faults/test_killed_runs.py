"""Runs that are ended anywhere, by SIGKILL or by a signal that asks, and come to the end of an unbroken run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults import ENGINES, Zygote, broken_run, differences, ending

pytestmark = pytest.mark.recipe

TRAINING = "resuming from"


def check_killed(started: Zygote, run_inputs: Path, unbroken, folder: Path, engine: str, seed: int) -> None:
    reference, seconds = unbroken(engine)
    found = broken_run(started, ENGINES[engine], folder, run_inputs, reference, seed=seed, usual_s=seconds)
    assert not found["differences"], (found, folder.with_suffix(".log").read_text()[-4000:])


@pytest.mark.parametrize("engine", ["ddp3", "zero2", "zero3"])
@pytest.mark.timeout(600)
def test_a_killed_run_comes_to_the_same_end(started, run_inputs, unbroken, tmp_path, engine):
    check_killed(started, run_inputs, unbroken, tmp_path / engine, engine, seed=11)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 104))
@pytest.mark.parametrize("engine", ["ddp", "ddp3", "zero2", "zero3", "fsdp2"])
@pytest.mark.timeout(600)
def test_a_run_comes_to_the_same_end_wherever_it_is_killed(
    started, run_inputs, unbroken, tmp_path, engine, seed
):
    check_killed(started, run_inputs, unbroken, tmp_path / engine, engine, seed)


@pytest.mark.parametrize(
    ("number", "at"), [(signal.SIGTERM, "step 6 |"), (signal.SIGUSR1, "step 9/24")], ids=["term", "usr1"]
)
@pytest.mark.timeout(600)
def test_a_run_that_is_asked_to_end_saves_this_step_and_goes_on(
    started, run_inputs, unbroken, tmp_path, number, at
):
    reference, _ = unbroken("ddp")
    folder = tmp_path / "run"
    asked = started.run(
        ENGINES["ddp"], folder, run_inputs, "train.save_steps=null",
        victims=[1], signal=int(number), at_log=at,
    )  # fmt: skip
    log = folder.with_suffix(".log").read_text()
    assert asked["codes"] == [75, 75], log[-4000:]
    assert "it has left a checkpoint" in log
    (checkpoint,) = folder.glob("checkpoint-*")
    assert (checkpoint / "COMPLETE").exists()
    assert set(started.run(ENGINES["ddp"], folder, run_inputs)["codes"]) == {0}
    assert TRAINING in folder.with_suffix(".log").read_text()
    assert not differences(ending(folder), reference)
