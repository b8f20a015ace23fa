"""One folder in the place of another: whole under its name at all times, however the system can do it."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from sealed_folders import FAULTS, Crash, failing

from swaft.distributed import Ranks
from swaft.errors import StateError
from swaft.storage import Spec, files, read_manifest, verify, write_tensors
from swaft.storage.files import beside, replace_folder, standing
from swaft.storage.together import write_together

pytestmark = pytest.mark.unit

FILES = re.compile(r"(w\.safetensors|manifest\.json|COMPLETE)(\.tmp)?")


@pytest.fixture(params=["exchanged", "renamed twice"])
def ways(request, monkeypatch):
    if request.param == "renamed twice":  # as on NFS
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param


def test_a_folder_takes_the_place_of_another_or_of_none(tmp_path, ways):
    for content in ("first", "second", "third"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text(content)
        replace_folder(tmp_path / "new", tmp_path / "kept")
        assert (tmp_path / "kept" / "file").read_text() == content
        assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def write(folder, value: float) -> None:
    def rank(place):
        values = torch.full((3,), value)
        record = write_tensors(place / "w.safetensors", {"w": Spec.of(values)}, lambda name: [values])
        return {"w.safetensors": record}

    write_together(Ranks(), folder, kind="test", write=rank, content={"value": value}, overwrites=FILES)


def value_in(folder) -> float:
    found = standing(folder)
    manifest = read_manifest(found, kind="test")
    verify(found, manifest)
    return manifest.content["value"]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_whatever_call_fails_the_old_folder_or_the_new_one_is_there_whole(tmp_path, ways, fault):
    names = ("write", "fsync", "replace", "rename", "open", "unlink", "rmdir", "mkdir")
    calls = (*(f"os.{name}" for name in names), "swaft.storage.files._exchange")
    folder, seen = tmp_path / "state", set()
    for survived in range(300):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write(folder, 1.0)
        try:
            with failing(fault, survived, *calls):
                write(folder, 2.0)
            failed = False
        except (Crash, StateError):
            failed = True
        found = value_in(folder)
        seen.add(found)
        assert failed or found == 2.0
        write(folder, 3.0)  # the next one clears away what was left
        assert value_in(folder) == 3.0
        assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
        if not failed:
            break
    assert not failed
    assert seen == {1.0, 2.0}
    assert survived > 10


@pytest.mark.parametrize("name", ["note.txt", "w.safetensors.mine"])
def test_what_somebody_else_has_put_there_is_never_overwritten(tmp_path, name):
    write(tmp_path / "state", 1.0)
    (tmp_path / "state" / name).write_text("mine")
    with pytest.raises(StateError, match=f"holds '{name}'.*not overwritten"):
        write(tmp_path / "state", 2.0)
    assert (tmp_path / "state" / name).read_text() == "mine"
    assert value_in(tmp_path / "state") == 1.0
    assert not beside(tmp_path / "state", "new").exists()


def test_the_remains_of_a_save_that_was_killed_are_overwritten(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "w.safetensors.tmp").write_text("half")
    write(tmp_path / "state", 2.0)
    assert value_in(tmp_path / "state") == 2.0


def test_a_link_stays_one_and_its_folder_is_replaced(tmp_path):
    write(tmp_path / "real", 1.0)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", 2.0)
    assert (tmp_path / "link").is_symlink()
    assert value_in(tmp_path / "real") == 2.0


class Elsewhere(Ranks):
    """A rank on a machine that does not see the folder that rank 0 has made."""

    is_main = False


def test_a_folder_that_one_machine_does_not_see_is_refused_before_any_rank_waits_for_others_in_it(tmp_path):
    written = []
    with pytest.raises(
        StateError, match="not on this machine; name a folder on a file system that all machines"
    ):
        write_together(Elsewhere(), tmp_path / "new", kind="test", write=written.append, content={})
    meetings = []

    class Counted(Ranks):
        def raise_together(self, error, **how):
            meetings.append(error)
            super().raise_together(error, **how)

    def write(folder):
        written.append(len(meetings))
        return {}

    write_together(Counted(), tmp_path / "seen", kind="test", write=write, content={})
    assert written == [2]  # made by rank 0, seen by all
