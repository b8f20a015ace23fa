"""What the system refuses: a full disk, a read-only one, a size limit, a fault or a crash at any call."""

from __future__ import annotations

import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from sealed_folders import FAULTS, Crash, failing, make_folder
from small_disks import file_system, mount

from swaft.errors import StateError
from swaft.storage import Spec, is_complete, read_manifest, verify, write_durably, write_tensors

pytestmark = pytest.mark.unit


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB."""
    with file_system(tmp_path / "disk", size="1m") as wrong:
        if wrong:
            pytest.skip(wrong)
        yield tmp_path / "disk"


def write(path, numel):
    write_tensors(path, {"w": Spec(torch.float32, (numel,))}, lambda name: [torch.ones(numel)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_nothing_and_older_files_as_they_were(disk):
    manifest = make_folder(disk / "old")
    before = names(disk / "old")
    with pytest.raises(StateError, match=r"old/new could not be written: No space left on device") as error:
        write(disk / "old" / "new", 1 << 20)
    assert isinstance(error.value.__cause__, OSError)
    assert names(disk / "old") == before
    with pytest.raises(StateError, match="No space left on device"):
        write_durably(disk / "old" / "note.txt", bytes(1 << 21))
    assert names(disk / "old") == before
    verify(disk / "old", manifest)


def test_a_disk_that_fills_while_a_folder_is_sealed_leaves_it_incomplete(disk):
    for filler in range(0, 1 << 20, 1 << 15):
        (disk / "filler").write_bytes(bytes(filler))
        try:
            make_folder(disk / "x", numel=100_000)
        except (StateError, OSError):
            assert not is_complete(disk / "x")
        else:
            verify(disk / "x", read_manifest(disk / "x", kind="test"))
        shutil.rmtree(disk / "x")


def test_a_read_only_disk_is_named_and_nothing_changes(disk):
    manifest = make_folder(disk / "old")
    assert not mount("-o", "remount,ro", str(disk))
    with pytest.raises(StateError, match=r"new.tmp could not be created: Read-only file system"):
        write(disk / "old" / "new", 1)
    with pytest.raises(StateError, match="Read-only file system"):
        write_durably(disk / "old" / "note.txt", b"new")
    verify(disk / "old", manifest)


@contextmanager
def size_limit(count):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_size_limit_leaves_nothing(tmp_path):
    with pytest.raises(StateError, match="x could not be written: File too large"), size_limit(1 << 20):
        write(tmp_path / "x", 1 << 20)
    assert names(tmp_path) == []


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_whatever_call_fails_a_folder_is_complete_or_has_no_mark(tmp_path, fault):
    calls = ("os.write", "os.fsync", "os.replace", "os.rename", "os.open")
    for survived in range(200):
        try:
            with failing(fault, survived, *calls):
                make_folder(tmp_path / "x")
            failed = False
        except (Crash, StateError):
            failed = True
        if is_complete(tmp_path / "x"):
            verify(tmp_path / "x", read_manifest(tmp_path / "x", kind="test"))
        shutil.rmtree(tmp_path / "x")
        if not failed:
            break
    assert not failed
    assert survived > 30
