"""What reaches the disk before what: after a loss of power no name leads to less than it promises."""

from __future__ import annotations

import os

import pytest
from sealed_folders import make_inner

from swaft.storage import files, remove_sealed, write_durably
from swaft.storage.files import new_folder, replace_folder

pytestmark = pytest.mark.unit


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """The calls that change names below the folder or wait for the disk, each with the path it is about."""
    calls = []

    def told(name, real):
        def call(first, *arguments, **options):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            if os.path.isabs(path):  # else an entry that `rmtree` deletes
                calls.append(f"{name} {os.path.relpath(path, os.path.realpath(tmp_path))}")
            return real(first, *arguments, **options)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, told(name, getattr(os, name)))
    return calls


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_anything_else(tmp_path, seen):
    write_durably(tmp_path / "a", b"new")
    assert seen[-3:] == ["fsync a.tmp", "replace a.tmp", "fsync ."]


def test_the_mark_is_off_the_disk_before_any_file_it_stands_for(tmp_path, seen):
    make_inner(tmp_path / "x")
    seen.clear()
    remove_sealed(tmp_path / "x")
    assert seen == ["unlink x/COMPLETE", "fsync x", "rmdir x", "fsync ."]


def test_the_name_of_a_new_folder_is_on_the_disk_at_the_end(tmp_path, seen):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert [call.split()[0] for call in seen] == ["fsync", "fsync", "rename", "rmdir", "fsync"]
    assert seen[-1] == "fsync ."


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_folder_is_deleted_once_the_one_in_its_place_is_on_the_disk(tmp_path, seen, monkeypatch, exchanged):
    if not exchanged:  # as on NFS
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for name in ("new", "kept"):
        (tmp_path / name).mkdir()
    replace_folder(tmp_path / "new", tmp_path / "kept")
    renamed = [] if exchanged else ["replace kept", "replace new"]
    assert seen == [*renamed, "fsync .", f"rmdir {'new' if exchanged else '.kept.old'}"]
