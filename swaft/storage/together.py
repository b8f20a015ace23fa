"""Sealed folders that several ranks write and read together: complete once every rank is done."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from swaft.distributed import Ranks
from swaft.errors import ConfigError, StateError, SwaftError
from swaft.storage.files import FileRecord, beside, explained, is_free, replace_folder, status
from swaft.storage.sealed import COMPLETE, MANIFEST, Manifest, read_manifest, seal, verify
from swaft.storage.strict_json import shown

Write = Callable[[Path], Mapping[str, FileRecord]]
"""Writes this rank's files into a folder, synced to disk, and returns their records by relative path."""
SHARED_PATIENCE_S = 60.0
"""Seconds to wait for a new file to appear on other machines: NFS remembers for that long that it was missing."""


def require_shared(mark: Path, setting: str) -> None:
    """Refuse a folder that other machines do not see; to be called on every rank, after the main one made a file.

    Args:
        mark: the file, in the folder.
        setting: what names the folder.

    Raises:
        ConfigError: the file does not appear here.
    """
    deadline = time.monotonic() + SHARED_PATIENCE_S
    while not mark.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{setting}: {mark.parent} on {socket.gethostname()} is not the folder the main process writes to; "
                "name one on a file system that all machines share"
            )
        time.sleep(1.0)


def write_together(
    ranks: Ranks,
    path: str | PathLike[str],
    *,
    kind: str,
    write: Write,
    content: Mapping[str, Any],
    overwrites: re.Pattern[str] | None = None,
) -> None:
    """Let every rank write its part of a new folder, and mark it complete after the last (collective).

    The folder has its name from the start but no mark until the end, so nothing is renamed while other ranks write
    into it. A folder that replaces another is written next to it and takes the name once complete, so there is
    always one of the two. Sealed folders that `write` leaves directly inside become part of it.

    Args:
        ranks: the ranks that write.
        path: folder to write. It must not exist or must be empty.
        kind: of the manifest.
        write: called on every rank; may make collective calls, if it makes them even after a failure.
        content: of the manifest, the same on every rank.
        overwrites: pattern of file names; an existing folder that holds only such files is replaced. None: no
            folder is.

    Raises:
        StateError: a rank could not write. Raised on every rank, and the unfinished folder is removed.
    """
    # That of rank 0, should the ranks name different ones (by the time, or from different folders). A link that is
    # replaced stays; others may lead elsewhere on another machine.
    followed = os.path.abspath if overwrites is None else os.path.realpath
    folder = final = Path(ranks.gather(followed(path))[0])
    if overwrites is not None:
        folder = beside(final, "new")
    with ranks.together():
        if ranks.is_main:
            if overwrites is not None:
                _refuse_foreign(final, overwrites)
                shutil.rmtree(folder, ignore_errors=True)  # left from an interrupted write
            if not is_free(folder):
                raise StateError(
                    f"{folder} holds files already; expected a new folder: name another path, or pass "
                    "overwrite=True"
                )
            with explained(folder, "made"):
                folder.mkdir(parents=True, exist_ok=True)
    fault = f"{final} could not be written"
    records: Mapping[str, FileRecord] = {}
    try:
        with ranks.together(fault):
            if not folder.is_dir():  # found out by all ranks before one of them waits inside `write`
                raise StateError(
                    "it is not on this machine; name a folder on a file system that all machines share"
                )
        with ranks.together(fault):
            records = write(folder)
        written = ranks.gather(records)
        with ranks.together(fault):
            if ranks.is_main:
                files = {name: record for each in written for name, record in each.items()}
                inner = sorted(mark.parent for mark in folder.glob(f"*/{COMPLETE}"))
                sealed = {each.name: _sha256((each / MANIFEST).read_bytes()) for each in inner}
                seal(folder, Manifest(kind, files, content, sealed))
                if folder != final:
                    replace_folder(folder, final)
    except SwaftError:
        if ranks.is_main:  # all ranks are here, so none is still writing
            shutil.rmtree(folder, ignore_errors=True)
        raise


def open_together(ranks: Ranks, path: str | PathLike[str], *, kind: str) -> Manifest:
    """Read a folder's manifest on every rank, and check every byte of its files, each on one rank (collective).

    Sealed folders inside are checked the same way.

    Args:
        ranks: the ranks that read.
        path: of the folder.
        kind: that its manifest must have.

    Returns:
        The manifest, the same on every rank.

    Raises:
        StateError: the folder is incomplete or damaged; on every rank, names the file and field.
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
    """Every file that a manifest covers, with the folder and the manifest that lists it."""
    for name in sorted(manifest.files):
        yield folder, manifest, name
    for name in sorted(manifest.sealed):
        yield from _files(folder / name, read_manifest(folder / name, kind=None))


def _refuse_foreign(folder: Path, known: re.Pattern[str]) -> None:
    """Refuse to replace a folder that holds anything else."""
    if status(folder) is None:
        return
    with explained(folder, "looked into"):
        others = sorted(entry for entry in os.listdir(folder) if not known.fullmatch(entry))
    if others:
        raise StateError(
            f"{folder} holds {shown(others[0])}, which nothing of this kind has written, so it is not overwritten; "
            "name another path"
        )
