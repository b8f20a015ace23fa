"""Which checkpoint a run goes on from, and which are deleted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from swaft.distributed import Ranks
from swaft.errors import ConfigError, StateAccessError, StateError
from swaft.storage import hash_file, is_complete, write_durably
from swaft.training.run.checkpoints import (
    checkpoint_on_paper,
    choose_checkpoint,
    delete_old,
    find_checkpoints,
    save_checkpoint,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


def save(ranks: Ranks, folder: Path, *steps: int) -> None:
    for step in steps:

        def write(path: Path, step: int = step):
            write_durably(path / "file", b"x" * step)
            return {"file": hash_file(path / "file")}

        save_checkpoint(ranks, folder, step, write=write, content={"step": step})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)


def refuse(monkeypatch, call: str, number: int, name: str) -> None:
    """Have a call of `os` refuse paths with a name in them."""
    real = getattr(os, call)

    def refusing(path, *arguments, **options):
        if name in os.fspath(path):
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, refusing)


def test_the_newest_is_the_one_with_the_largest_number(ranks, tmp_path):
    save(ranks, tmp_path, 100, 9, 20)
    assert [path.name for path in find_checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-9",
    ]
    chosen = choose_checkpoint("auto", tmp_path, ranks)
    assert chosen
    assert chosen.manifest.content == {"step": 100}


def test_one_that_was_never_finished_does_not_count_which_is_said(ranks, tmp_path, caplog):
    save(ranks, tmp_path, 5, 10)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-10" / "COMPLETE").unlink()
    chosen = choose_checkpoint("auto", tmp_path, ranks)
    assert chosen
    assert chosen.path.name == "checkpoint-5"
    assert "checkpoint-10 has no mark COMPLETE" in caplog.text
    assert "the newest that does is checkpoint-5" in caplog.text
    assert "checkpoint-3" not in caplog.text  # nothing is lost by it


def test_a_run_that_was_ended_in_its_first_checkpoint_says_that_it_begins_anew(ranks, tmp_path, caplog):
    save(ranks, tmp_path, 5)
    (tmp_path / "checkpoint-5" / "COMPLETE").unlink()
    assert choose_checkpoint("auto", tmp_path, ranks) is None
    assert "checkpoint-5 has no mark COMPLETE" in caplog.text
    assert "the run starts from scratch" in caplog.text


@pytest.mark.parametrize("file", ["file", "manifest.json", "COMPLETE"])
def test_of_a_damaged_one_the_one_before_is_taken_and_that_is_said(ranks, tmp_path, file, caplog):
    save(ranks, tmp_path, 5, 10)
    flip(tmp_path / "checkpoint-10" / file)
    (tmp_path / "checkpoint-10.damaged" / "of an earlier one").mkdir(parents=True)
    chosen = choose_checkpoint("auto", tmp_path, ranks)
    assert chosen
    assert chosen.path.name == "checkpoint-5"
    assert "is damaged, and now called" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10.damaged"}
    assert not (tmp_path / "checkpoint-10.damaged" / "of an earlier one").exists()
    assert find_checkpoints(tmp_path) == [tmp_path / "checkpoint-5"]


@pytest.mark.parametrize("fault", ["memory", "link"])
def test_one_that_may_be_sound_but_cannot_be_read_now_is_not_passed_over(ranks, tmp_path, fault, monkeypatch):
    save(ranks, tmp_path, 5, 10)
    if fault == "link":
        (tmp_path / "checkpoint-10").rename(tmp_path / "elsewhere")
        (tmp_path / "checkpoint-10").symlink_to(tmp_path / "elsewhere")
    else:
        refuse(monkeypatch, "open", errno.ENOMEM, "checkpoint-10")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(StateAccessError, match="checkpoint-10"):
        choose_checkpoint("auto", tmp_path, ranks)
    if fault == "link":
        with pytest.raises(StateAccessError, match="checkpoint-10 is a symbolic link"):
            checkpoint_on_paper("auto", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_disk_that_has_lost_a_file_has_damaged_it(ranks, tmp_path, monkeypatch):
    save(ranks, tmp_path, 5, 10)
    refuse(monkeypatch, "open", errno.EIO, "checkpoint-10")
    chosen = choose_checkpoint("auto", tmp_path, ranks)
    assert chosen
    assert chosen.path.name == "checkpoint-5"


def test_a_folder_that_cannot_be_looked_into_costs_no_run_that_has_saved(
    ranks, tmp_path, monkeypatch, caplog
):
    save(ranks, tmp_path, 5, 10)
    refuse(monkeypatch, "lstat", errno.EACCES, "checkpoint")
    delete_old(tmp_path, 1)
    assert "no checkpoint is deleted" in caplog.text


def test_where_all_are_damaged_the_run_does_not_begin_anew(ranks, tmp_path):
    save(ranks, tmp_path, 5, 10)
    for step in (5, 10):
        flip(tmp_path / f"checkpoint-{step}" / "file")
    with pytest.raises(
        StateError, match=r"no checkpoint in .* can be resumed from, the newest because: .*checkpoint-10"
    ):
        choose_checkpoint("auto", tmp_path, ranks)
    assert len(find_checkpoints(tmp_path)) == 2  # which may be sound, and the disk not


def test_the_one_that_is_named_is_the_only_one_to_do(ranks, tmp_path):
    save(ranks, tmp_path, 5, 10)
    flip(tmp_path / "checkpoint-10" / "file")
    with pytest.raises(StateError, match=r"checkpoint-10/file is damaged"):
        choose_checkpoint(str(tmp_path / "checkpoint-10"), tmp_path, ranks)
    assert choose_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path / "other", ranks)


def test_before_a_launch_one_with_a_damaged_manifest_is_passed_over_unless_it_is_named(ranks, tmp_path):
    save(ranks, tmp_path, 5, 10)
    flip(tmp_path / "checkpoint-10" / "manifest.json")
    found = checkpoint_on_paper("auto", tmp_path)
    assert found
    assert found.path.name == "checkpoint-5"
    assert checkpoint_on_paper("none", tmp_path) is None
    with pytest.raises(StateError, match="manifest"):
        checkpoint_on_paper(str(tmp_path / "checkpoint-10"), tmp_path)


def test_going_back_in_a_folder_with_later_ones_is_refused(ranks, tmp_path):
    save(ranks, tmp_path, 5, 10)
    with pytest.raises(ConfigError, match=r"holds later checkpoints than checkpoint-5 \(checkpoint-10\)"):
        choose_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path, ranks)


@pytest.mark.parametrize("named", ["nowhere", "checkpoint-7", "last"])
def test_what_is_no_checkpoint_is_named(ranks, tmp_path, named):
    (tmp_path / "last").mkdir()
    with pytest.raises(
        ConfigError, match=r"train\.resume_from_checkpoint: .* is not a folder called checkpoint-NUMBER"
    ):
        choose_checkpoint(str(tmp_path / named), tmp_path, ranks)


def test_the_old_ones_go_and_what_is_left_of_unfinished_ones_goes_before_its_space_is_needed(ranks, tmp_path):
    save(ranks, tmp_path, 5, 10)
    (tmp_path / "checkpoint-12").mkdir()

    def write(path: Path):
        assert find_checkpoints(tmp_path, complete=False) == [path]
        return {}

    save_checkpoint(ranks, tmp_path, 15, write=write, content={})
    delete_old(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-15"}
    delete_old(tmp_path, None)
    assert len(find_checkpoints(tmp_path)) == 2


def test_one_that_cannot_be_written_leaves_nothing_and_the_others_whole(ranks, tmp_path):
    save(ranks, tmp_path, 5)

    def write(path: Path):
        (path / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(StateError, match=r"checkpoint-10 could not be written: No space left on device"):
        save_checkpoint(ranks, tmp_path, 10, write=write, content={})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert choose_checkpoint("auto", tmp_path, ranks)


def test_one_that_is_there_is_not_written_again(ranks, tmp_path):
    save(ranks, tmp_path, 5)
    before = (tmp_path / "checkpoint-5" / "COMPLETE").read_text()
    save(ranks, tmp_path, 5)
    assert is_complete(tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5" / "COMPLETE").read_text() == before
