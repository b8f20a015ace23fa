"""Files of a run's checkpoint cut, flipped, deleted, exchanged or of another step: noticed, always, and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from damage import Damage, all_files, damages, harmless, newer
from faults import ENGINES, differences, ending

from swaft.distributed import Ranks
from swaft.errors import StateAccessError, StateError
from swaft.training.run.checkpoints import choose_checkpoint, find_checkpoints

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(600)]

FOUR = ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3", "fsdp2"))]


def what_a_named_one_does_wrong(folder: Path, checkpoint: Path, damage: Damage) -> str:
    """What is wrong when a run is to go on from the damaged checkpoint; "" where it is refused as it should."""
    try:
        choose_checkpoint(str(checkpoint), folder, Ranks())
    except StateError as error:
        if any(str(path) in str(error) for path in damage.culprits):
            return ""
        return f"{damage.name}: no file is named in: {error}"
    return f"{damage.name}: not noticed"


def what_auto_does_wrong(folder: Path, checkpoint: Path, before: Path, damage: Damage, caplog) -> str:
    """What is wrong when a run is to go on from whatever is sound; the checkpoint has its name afterwards."""
    caplog.clear()
    was_marked = (checkpoint / "COMPLETE").exists()
    chosen = choose_checkpoint("auto", folder, Ranks())
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    put_aside = aside.exists()
    if put_aside:
        aside.rename(checkpoint)
    if chosen is None or chosen.path != before:
        return f"{damage.name}: {chosen} is gone on from"
    told = "is damaged, and now called" in caplog.text and str(before) in caplog.text
    if was_marked and not (told and put_aside):
        return f"{damage.name}: it was not said, or not put aside: {caplog.text!r}"
    if not was_marked and put_aside:
        return f"{damage.name}: one that was never finished was called damaged"
    return ""


def check_damage(folder: Path, caplog, *, flips: int) -> int:
    """Do all damage to the newest checkpoint of a run; returns how many kinds."""
    newest, before = find_checkpoints(folder)
    wrong, count = [], 0
    for damage in damages(newest, before, flips=flips, seed=len(all_files(newest))):
        with damage.done():
            wrong += [
                what_a_named_one_does_wrong(folder, newest, damage),
                what_auto_does_wrong(folder, newest, before, damage, caplog),
            ]
        count += 1
    assert not [each for each in wrong if each]
    chosen = choose_checkpoint("auto", folder, Ranks())
    assert chosen
    assert chosen.path == newest
    return count


def test_every_kind_of_damage_to_every_file_is_noticed(asked_to_end, caplog):
    assert check_damage(asked_to_end("ddp"), caplog, flips=1) >= 100


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_thousand_times_damage_is_noticed(asked_to_end, caplog, engine):
    assert check_damage(asked_to_end(engine), caplog, flips=6) >= 250


@pytest.mark.parametrize("engine", FOUR)
def test_files_that_belong_to_no_checkpoint_change_nothing(asked_to_end, caplog, engine):
    folder = asked_to_end(engine)
    newest, _ = find_checkpoints(folder)
    for stray in harmless(newest):
        with stray.done():
            chosen = choose_checkpoint("auto", folder, Ranks())
            assert chosen, stray.name
            assert chosen.path == newest, stray.name
    assert "damaged" not in caplog.text


def test_what_a_newer_swaft_wrote_is_neither_passed_over_nor_put_aside(asked_to_end):
    newest, _ = find_checkpoints(asked_to_end("ddp"))
    for damage in newer(newest):
        for wanted in ("auto", str(newest)):
            with damage.done(), pytest.raises(StateAccessError, match=r"written by a newer swaft.*Upgrade"):
                choose_checkpoint(wanted, newest.parent, Ranks())
        assert newest.exists()


def test_no_two_checkpoints_share_a_file(asked_to_end):
    shared = [path for path in asked_to_end("ddp").rglob("*") if path.is_file() and path.stat().st_nlink > 1]
    assert not shared


@pytest.mark.parametrize("engine", FOUR)
def test_a_run_whose_newest_checkpoint_is_damaged_comes_to_the_same_end(
    started, run_inputs, asked_to_end, unbroken, tmp_path, engine
):
    folder = shutil.copytree(asked_to_end(engine), tmp_path / engine)
    newest, before = find_checkpoints(folder)
    file = newest / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert set(started.run(ENGINES[engine], folder, run_inputs)["codes"]) == {0}
    said = folder.with_suffix(".log").read_text()
    assert f"{file} has" in said
    assert f"resuming from {before}" in said
    assert not differences(ending(folder), unbroken(engine)[0])
