"""Signals, kills, delays and clocks at moments that nobody chooses: a run comes to the end of an unbroken one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from faults import ENGINES, Zygote, differences, ending

from swaft.training.run.checkpoints import find_checkpoints

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(600)]

ASKED = "the run was asked to end (SIGTERM or SIGUSR1); it has left a checkpoint"
SHARDED = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3", "fsdp2")]
IN_FIRST_SAVE = (25, 3)
"""Of the calls of rank 0 and of rank 1 that end a write to the disk, one within the first save."""
IN_SECOND_SAVE = 12
"""Likewise of rank 1."""
ALL_SLOW = [pytest.param("ddp", marks=pytest.mark.slow), *SHARDED]
YEAR_2001, YEAR_2100 = 1_000_000_000, 4_102_444_800


class Runs:
    """Starts one run of an engine as often as it takes, and compares its end with an unbroken one's."""

    def __init__(self, started: Zygote, inputs: Path, unbroken: Any, folder: Path):
        self.folder, self.log = folder / "run", folder / "run.log"
        self._started, self._inputs, self._unbroken = started, inputs, unbroken

    def run(self, engine: str, *settings: str, **order: Any) -> list[int]:
        """Exit codes of the ranks."""
        return self._started.run(ENGINES[engine], self.folder, self._inputs, *settings, **order)["codes"]

    def comes_to_the_same_end(self, engine: str) -> None:
        """Let the run go on to its end, unless it is there, and compare."""
        if not (self.folder / "summary.json").exists():
            codes = self.run(engine)
            assert set(codes) == {0}, self.log.read_text()[-4000:]
            assert "resuming from" in self.log.read_text()
        assert not differences(ending(self.folder), self._unbroken(engine)[0])

    def steps(self) -> list[int]:
        """Of the complete checkpoints, the newest first."""
        return [int(path.name.split("-")[1]) for path in find_checkpoints(self.folder)]


@pytest.fixture
def runs(started, run_inputs, unbroken, tmp_path) -> Runs:
    return Runs(started, run_inputs, unbroken, tmp_path)


@pytest.mark.parametrize("engine", ALL_SLOW)
@pytest.mark.parametrize(("deed", "rank"), [("term", 1), ("usr1", 0)])
def test_a_run_that_is_asked_to_end_while_it_saves_ends_with_that_checkpoint(runs, engine, deed, rank):
    codes = runs.run(engine, events=[{"ranks": [rank], "do": deed, "at_disk_calls": [IN_FIRST_SAVE[rank]]}])
    assert codes == [75, 75], runs.log.read_text()[-4000:]
    assert runs.log.read_text().count(ASKED) == 1
    assert runs.steps() == [4]
    runs.comes_to_the_same_end(engine)


@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_more_signals_while_the_last_checkpoint_is_written_change_nothing(runs, engine):
    codes = runs.run(
        engine, "train.save_steps=null", victims=[1], signal=int(signal.SIGTERM), at_log="step 9/24",
        events=[{"ranks": [1], "do": "term", "at_disk_calls": [1, 5]},
                {"ranks": [1], "do": "usr1", "at_disk_calls": [3]}],
    )  # fmt: skip
    assert codes == [75, 75], runs.log.read_text()[-4000:]
    assert runs.log.read_text().count(ASKED) == 1
    assert len(runs.steps()) == 1
    assert not find_checkpoints(runs.folder, complete=False)
    runs.comes_to_the_same_end(engine)


@pytest.mark.parametrize("engine", ALL_SLOW)
def test_a_run_that_is_asked_to_end_while_averages_are_evaluated_saves_the_live_weights(runs, engine):
    codes = runs.run(engine, "train.save_steps=null", events=[{"ranks": [1], "do": "term", "in_swap": 1}])
    assert codes == [75, 75], runs.log.read_text()[-4000:]
    assert runs.steps() == [12]
    runs.comes_to_the_same_end(engine)


@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_a_run_that_is_killed_while_averages_are_evaluated_comes_to_the_same_end(runs, engine):
    codes = runs.run(engine, events=[{"ranks": [0, 1], "do": "kill", "in_swap": 1}])
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert runs.steps() == [8, 4]
    runs.comes_to_the_same_end(engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_signals_to_all_processes_of_a_rank_spare_those_that_load_batches(runs, engine):
    workers = "train.dataloader_num_workers=2"
    codes = runs.run(
        engine, workers, victims=[0, 1], group=True, signal=int(signal.SIGTERM), at_log="step 9/24"
    )
    assert codes == [75, 75], runs.log.read_text()[-4000:]
    runs.comes_to_the_same_end(engine)


@pytest.mark.parametrize("engine", ALL_SLOW)
def test_a_rank_that_is_late_at_the_disk_changes_nothing(runs, engine):
    events = [
        {"ranks": [rank], "do": "sleep", "at_disk_calls": [call]} for rank, call in enumerate(IN_FIRST_SAVE)
    ]
    assert runs.run(engine, events=events) == [0, 0], runs.log.read_text()[-4000:]
    runs.comes_to_the_same_end(engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_ranks_that_wait_for_one_that_stands_still_end_in_words_and_lose_no_checkpoint(runs, engine):
    stop = {"ranks": [1], "do": "stop", "at_disk_calls": [IN_SECOND_SAVE]}
    codes = runs.run(engine, "train.ddp_timeout=10", events=[stop])
    assert codes == [1, -signal.SIGKILL]
    said = runs.log.read_text()
    assert "other ranks did not answer within train.ddp_timeout seconds" in said
    assert "of 2 ranks these said nothing for 5 s: 1" in said
    assert runs.steps() == [4]
    runs.comes_to_the_same_end(engine)


@pytest.mark.parametrize("engine", ALL_SLOW)
def test_clocks_and_times_of_files_decide_nothing(runs, engine):
    codes = runs.run(
        engine, victims=[0], signal=int(signal.SIGTERM), at_log="step 15/24",
        events=[{"ranks": [rank], "do": "turn the clock back", "at_disk_calls": [call]}
                for rank, call in enumerate(IN_FIRST_SAVE)],
    )  # fmt: skip
    assert codes == [75, 75], runs.log.read_text()[-4000:]
    newest, older = find_checkpoints(runs.folder)
    for checkpoint, moment in ((newest, YEAR_2001), (older, YEAR_2100)):
        for path in (*checkpoint.rglob("*"), checkpoint):
            os.utime(path, (moment, moment))
    runs.comes_to_the_same_end(engine)
    assert f"resuming from {newest}" in runs.log.read_text()
