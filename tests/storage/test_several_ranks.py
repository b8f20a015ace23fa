"""Folders that two ranks write and check together, each of them played here in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from sealed_folders import make_folder

from swaft.distributed import Ranks
from swaft.errors import StateError
from swaft.storage import hash_file, read_manifest, write_durably
from swaft.storage.together import open_together, write_together

pytestmark = pytest.mark.unit


class OneOfTwo(Ranks):
    """A rank of two. What the other one says is made from what this one says, by default the same."""

    def __init__(self, rank: int, other: Callable[[Any], Any] = lambda mine: mine):
        super().__init__()
        self.rank, self.world_size, self._other = rank, 2, other

    def gather(self, value, *, patiently=False):
        both = [value, self._other(value)]
        return both[:: -1 if self.rank else 1]


def refuses(rank: int, folder) -> bool:
    try:
        open_together(OneOfTwo(rank), folder, kind="test")
    except StateError as error:
        assert "is damaged" in str(error)
        return True
    return False


def test_every_file_is_read_by_one_of_the_ranks_and_each_rank_reads_some(tmp_path):
    make_folder(tmp_path / "x")
    files = ["rank0.safetensors", "deep/er/rank1.safetensors", "note.txt", "inner/note.txt"]
    finders = []
    for path in (tmp_path / "x" / name for name in files):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        finders.append([rank for rank in range(2) if refuses(rank, tmp_path / "x")])
        path.write_bytes(whole)
    assert sorted(finders) == [[0], [0], [1], [1]]


def test_ranks_that_see_different_folders_are_told_so(tmp_path):
    make_folder(tmp_path / "x")
    ranks = OneOfTwo(0, lambda mine: "another manifest's" if isinstance(mine, str) else mine)
    with pytest.raises(StateError, match="x is not the same folder on every rank; name one on a file system"):
        open_together(ranks, tmp_path / "x", kind="test")


def test_the_manifest_lists_what_every_rank_has_written(tmp_path):
    def write(folder):
        for name in ("mine", "theirs"):  # the other rank's part, too
            write_durably(folder / name, name.encode())
        return {"mine": hash_file(folder / "mine")}

    def other(mine):
        return {"theirs": hash_file(tmp_path / "x" / "theirs")} if isinstance(mine, Mapping) else mine

    write_together(OneOfTwo(0, other), tmp_path / "x", kind="test", write=write, content={})
    assert read_manifest(tmp_path / "x", kind="test").files.keys() == {"mine", "theirs"}


def test_the_first_names_its_folder_whole_and_by_its_links_which_may_lead_elsewhere_on_another_machine(
    tmp_path, monkeypatch
):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    written = []
    write_together(
        OneOfTwo(0), "link/x", kind="test", write=lambda folder: written.append(folder) or {}, content={}
    )
    assert written == [tmp_path / "link" / "x"]


def test_ranks_that_name_different_folders_write_that_of_the_first(tmp_path):
    """As where the name holds the time."""
    (tmp_path / "x").mkdir()
    ranks = OneOfTwo(1, lambda mine: str(tmp_path / "x") if isinstance(mine, str) else mine)
    written = []
    write_together(
        ranks, tmp_path / "y", kind="test", write=lambda folder: written.append(folder) or {}, content={}
    )
    assert written == [tmp_path / "x"]
