"""A disk that refuses any one call of a save, or has room for a part of it: one error, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faults import ENGINES, Ending, Zygote, differences, ending

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(900)]

FOUR = ("ddp", "zero2", "zero3", "fsdp2")
NAME = "läuf"
"""Of a run folder: one that is not ASCII has torch leave the writing to Python, which can be watched."""
STEP = 12
"""The third save of a run, which deletes the first checkpoint."""
FEWEST_SOME, FEWEST_LOOKS, FEWEST_CALLS = 30, 50, 120
"""Of what two ranks do to the disk in a save."""


@pytest.fixture
def quick(memory, tmp_path) -> Path:
    """A folder where nothing has to be waited for, if there is one."""
    return memory if isinstance(memory, Path) else tmp_path


@pytest.fixture
def small(memory) -> Path:
    """A folder with a disk of its own."""
    if not isinstance(memory, Path):
        pytest.skip(f"no file system can be mounted here: {memory}")
    return memory


def tries(
    started: Zygote, run_inputs: Path, folder: Path, engine: str, reference: Ending, kind: str
) -> list[dict[str, Any]]:
    """Every try of a save that was rehearsed in a run, which came to the same end; none found anything wrong."""
    run = folder / ("run" if kind == "space" else NAME)
    log, results = folder.parent / "run.log", folder.parent / "results.json"
    order = {"step": STEP, "kind": kind, "results": str(results)}
    found = started.run(
        ENGINES[engine], run, run_inputs, "train.ddp_timeout=60", log=str(log), rehearse=order
    )
    assert found["codes"] == [0, 0], log.read_text()[-4000:]
    assert not differences(ending(run), reference)
    known = json.loads(results.read_text())
    assert not [each for each in known if each["wrong"]]
    return known


def test_where_a_call_fails_all_ranks_say_the_same_and_no_checkpoint_is_lost(
    started, run_inputs, unbroken, quick
):
    known = tries(started, run_inputs, quick, "ddp", unbroken("ddp")[0], "some")
    assert len(known) >= FEWEST_SOME
    assert {each["left"] for each in known if each["said"]} == {"nothing"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", FOUR)
def test_whichever_call_or_write_fails_all_ranks_say_the_same_and_no_checkpoint_is_lost(
    started, run_inputs, unbroken, quick, engine
):
    known = tries(started, run_inputs, quick, engine, unbroken(engine)[0], "calls")
    assert len(known) >= FEWEST_CALLS
    assert {each["left"] for each in known if each["said"]} == {"nothing"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", FOUR)
def test_whichever_call_is_the_first_to_fail_for_good_no_checkpoint_is_lost(
    started, run_inputs, unbroken, quick, engine
):
    known = tries(started, run_inputs, quick, engine, unbroken(engine)[0], "lasting")
    assert len(known) >= FEWEST_CALLS


@pytest.mark.slow
@pytest.mark.parametrize("engine", FOUR)
def test_wherever_a_rank_cannot_look_all_ranks_say_the_same_and_no_checkpoint_is_lost(
    started, run_inputs, unbroken, quick, engine
):
    known = tries(started, run_inputs, quick, engine, unbroken(engine)[0], "looks")
    assert len(known) >= FEWEST_LOOKS


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in FOUR[1:])]
)
def test_however_much_of_a_checkpoint_a_disk_has_room_for_no_checkpoint_is_lost(
    started, run_inputs, unbroken, small, engine
):
    known = tries(started, run_inputs, small, engine, unbroken(engine)[0], "space")
    assert len(known) == 12
    assert all(each["said"] for each in known)
    assert {each["left"] for each in known} == {"nothing"}
