"""Sealed folders that several ranks write together and read together: complete once every rank is done."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from swaft.distributed import Ranks
from swaft.errors import StateError, SwaftError
from swaft.storage.files import FileRecord, beside, explained, is_free, replace_folder, status
from swaft.storage.sealed import COMPLETE, MANIFEST, Manifest, read_manifest, seal, verify
from swaft.storage.strict_json import shown

Write = Callable[[Path], Mapping[str, FileRecord]]
"""Writes this rank's files into a folder, on the disk to stay, and returns their records by relative path."""


def write_together(
    ranks: Ranks,
    path: str | PathLike[str],
    *,
    kind: str,
    write: Write,
    content: Mapping[str, Any],
    overwrites: re.Pattern[str] | None = None,
) -> None:
    """Have every rank write its part of a new folder, and declare it complete after the last (collective).

    The folder has its name from the start and no mark until the end, so nothing is ever renamed that other ranks
    write into. One that takes the place of another is written beside it, and has the name once it is complete: at
    no moment is there neither. Sealed folders that `write` leaves right inside become part of it.

    Args:
        ranks: who writes.
        path: folder to write. It must not exist, or be empty.
        kind: of the manifest.
        write: called on every rank; may make collective calls, if it makes them whatever fails.
        content: of the manifest, the same on every rank.
        overwrites: names of the files that a folder may hold already, which is then replaced; None: none may.

    Raises:
        StateError: a rank could not write; on every rank, and the unfinished folder is removed.
    """
    folder = final = Path(path)
    if overwrites is not None:
        final = Path(ranks.gather(os.path.realpath(path))[0])  # links stay
        folder = beside(final, "new")
    with ranks.together():
        if ranks.is_main:
            if overwrites is not None:
                _refuse_foreign(final, overwrites)
                shutil.rmtree(folder, ignore_errors=True)  # what was ended while it was written
            if not is_free(folder):
                raise StateError(f"{folder} holds files already; expected a new folder: name another path")
            with explained(folder, "made"):
                folder.mkdir(parents=True, exist_ok=True)
    try:
        records: Mapping[str, FileRecord] = {}
        with ranks.together(f"{final} could not be written"):
            records = write(folder)
        written = ranks.gather(records)
        with ranks.together(f"{final} could not be written"):
            if ranks.is_main:
                files = {name: record for each in written for name, record in each.items()}
                inner = sorted(mark.parent for mark in folder.glob(f"*/{COMPLETE}"))
                sealed = {each.name: _sha256((each / MANIFEST).read_bytes()) for each in inner}
                seal(folder, Manifest(kind, files, content, sealed))
                if folder != final:
                    replace_folder(folder, final)
    except SwaftError:
        if ranks.is_main:  # all ranks are here, so none writes any more
            shutil.rmtree(folder, ignore_errors=True)
        raise


def open_together(ranks: Ranks, path: str | PathLike[str], *, kind: str) -> Manifest:
    """Read a folder's manifest on every rank, and check every byte of its files, each by one rank (collective).

    Folders sealed inside are checked likewise.

    Args:
        ranks: who reads.
        path: of the folder.
        kind: that its manifest must be of.

    Returns:
        The manifest, the same on every rank.

    Raises:
        StateError: the folder is incomplete or damaged; on every rank, naming file and field.
    """
    folder = Path(path)
    with ranks.together():
        manifest = read_manifest(folder, kind=kind)
        files = list(_files(folder, manifest))
        for place, held, name in files[ranks.rank :: ranks.world_size]:
            verify(place, held, names=[name])
    digest = _sha256(repr(manifest).encode())
    if any(each != digest for each in ranks.gather(digest)):
        raise StateError(
            f"{folder} is not the same folder on every rank; name one on a file system that all machines share"
        )
    return manifest


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _files(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, Manifest, str]]:
    """Every file that a manifest vouches for, with the folder and the manifest that lists it."""
    for name in sorted(manifest.files):
        yield folder, manifest, name
    for name in sorted(manifest.sealed):
        yield from _files(folder / name, read_manifest(folder / name, kind=None))


def _refuse_foreign(folder: Path, known: re.Pattern[str]) -> None:
    """Refuse to replace what somebody else has put there."""
    facts = status(folder)
    if facts is None:
        return
    with explained(folder, "looked into"):
        others = sorted(entry for entry in os.listdir(folder) if not known.fullmatch(entry))
    if others:
        raise StateError(
            f"{folder} holds {shown(others[0])}, which nothing of this kind has written, so it is not overwritten; "
            "name another path"
        )
