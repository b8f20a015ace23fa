"""A folder with a list of its files and a mark that says it is complete.

    folder/manifest.json   {"format": "swaft", "version": 1, "kind": "...",
                            "files": {"relative/path": {"bytes": 12, "sha256": "64 hex digits"}},
                            "sealed": {"relative/folder": "SHA-256 of its manifest.json"},
                            "content": {...}}
    folder/COMPLETE        SHA-256 of manifest.json in hex, and a newline

The digests of files are those of :mod:`swaft.storage.hashing`; those of manifests are plain SHA-256. The mark is
written last and removed first, so a folder with a mark was once written completely, and its list accounts for every
byte. Files that are not listed are ignored.

Nothing in a folder is trusted: neither its names, nor its sizes, nor that its files are regular files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from swaft.errors import StateAccessError, StateError
from swaft.storage.files import (
    FileRecord,
    explained,
    read_whole,
    require_folder,
    require_regular,
    status,
    sync_folder,
    write_durably,
)
from swaft.storage.hashing import hash_file
from swaft.storage.strict_json import parse_object, shown

FORMAT = "swaft"
VERSION = 1
MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
MANIFEST_LIMIT = 256_000_000
"""Maximum bytes of a manifest."""
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")

FIELDS = ("format", "version", "kind", "files", "sealed", "content")
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a sealed folder holds."""

    kind: str
    """What it is; a reader asks for the kind it understands."""
    files: Mapping[str, FileRecord]
    """Relative path, with "/", to the record of the file."""
    content: Mapping[str, Any]
    """Any content of the writer, as JSON."""
    sealed: Mapping[str, str] = field(default_factory=dict)
    """Relative path of a sealed folder inside this one to the hash of its manifest."""


def seal(folder: str | PathLike[str], manifest: Manifest) -> str:
    """Mark a folder complete: write its manifest, then the mark.

    The files must already be synced to disk, as :func:`write_tensors` and :func:`write_durably` leave them.

    Returns:
        the hash of the manifest.

    Raises:
        StateError: the folder is already complete, a file is missing or has another size than recorded, or the disk
            is full.
    """
    folder = Path(folder)
    require_folder(folder)
    if is_complete(folder):
        raise StateError(f"{folder} is complete already; nothing was changed there. Name another folder")
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    content = {name: content[name] for name in FIELDS}
    raw = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    if len(raw) > MANIFEST_LIMIT:  # nothing would read it
        raise StateError(
            f"{folder / MANIFEST} would have {len(raw):,} bytes; expected at most {MANIFEST_LIMIT:,}"
        )
    _check_held(folder, _parse(raw, folder / MANIFEST, kind=manifest.kind))
    digest = hashlib.sha256(raw).hexdigest()
    write_durably(folder / MANIFEST, raw)
    write_durably(folder / COMPLETE, f"{digest}\n".encode())
    return digest


def is_complete(folder: str | PathLike[str]) -> bool:
    """Whether the mark exists. Cheap; nothing is checked."""
    return status(Path(folder) / COMPLETE) is not None


def find_checkpoints(folder: Path, *, complete: bool = True) -> list[Path]:
    """Complete checkpoints in a folder (or the incomplete ones), newest first by the number in their names.

    A missing folder has none; a folder that cannot be read raises a `StateError`.
    """
    with explained(folder, "looked into"):
        inside = folder.iterdir() if folder.is_dir() else ()
        there = [path for path in inside if step_of(path) >= 0]
    return [path for path in sorted(there, key=step_of, reverse=True) if is_complete(path) == complete]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for other names."""
    match = _CHECKPOINT.fullmatch(path.name)
    return -1 if match is None else int(match[1])


def read_manifest(folder: str | PathLike[str], *, kind: str | None) -> Manifest:
    """Read the manifest of a complete folder, and check everything against it except the content of the files.

    That is: the mark, the hash, every field, that every file is a regular file of the right size inside the folder,
    and the same for sealed folders inside.

    Args:
        folder: not a symbolic link.
        kind: the required kind; None: any.

    Raises:
        StateError: anything is wrong; names file and field, what was found and what was expected.
    """
    return _read(Path(folder), kind=kind)[0]


def verify(folder: str | PathLike[str], manifest: Manifest, *, names: Collection[str] | None = None) -> None:
    """Check every byte of a folder's files against its manifest.

    Args:
        folder: as for :func:`read_manifest`.
        manifest: the manifest it returned.
        names: relative paths of the files and sealed folders to verify; None: all.

    Raises:
        StateError: a file differs, or a name is not in the manifest.
    """
    folder = Path(folder)
    chosen = {*manifest.files, *manifest.sealed} if names is None else set(names)
    for name in sorted(chosen):
        if name in manifest.files:
            expected, found = manifest.files[name], hash_file(folder / name)
            if found != expected:
                raise StateError(
                    f"{folder / name} is damaged: {found.bytes:,} bytes of SHA-256 {found.sha256}; expected "
                    f"{expected.bytes:,} of {expected.sha256} (the tree digest of swaft.storage.hashing)"
                )
        elif name in manifest.sealed:
            verify(folder / name, _read_sealed(folder, name, manifest.sealed[name]))
        else:
            raise StateError(f"{folder / MANIFEST} lists no {name!r}")


def remove_sealed(folder: str | PathLike[str]) -> None:
    """Delete a folder, the mark first, so that whatever a crash leaves is not complete.

    Raises:
        StateError: it is not a folder, or could not be deleted.
    """
    folder = Path(folder)
    require_folder(folder)
    with explained(folder, "deleted"):
        if is_complete(folder):
            os.unlink(folder / COMPLETE)
            sync_folder(folder)
        shutil.rmtree(folder)
    sync_folder(folder.parent)


def _read(folder: Path, *, kind: str | None) -> tuple[Manifest, str]:
    """A checked manifest and its hash."""
    require_folder(folder)
    if not is_complete(folder):
        raise StateError(
            f"{folder} is not complete: it has no {COMPLETE} mark, so writing it was never finished"
        )
    mark = read_whole(folder / COMPLETE, limit=1024)
    raw = read_whole(folder / MANIFEST, limit=MANIFEST_LIMIT)
    digest = hashlib.sha256(raw).hexdigest()
    if mark != f"{digest}\n".encode():
        raise StateError(
            f"{folder / MANIFEST} is not the one that {folder / COMPLETE} marks: its SHA-256 is {digest}, expected "
            f"{mark[:80]!r}"
        )
    manifest = _parse(raw, folder / MANIFEST, kind=kind)
    _check_held(folder, manifest)
    return manifest, digest


def _read_sealed(folder: Path, name: str, expected: str) -> Manifest:
    inner, digest = _read(folder / name, kind=None)
    if digest != expected:
        raise StateError(
            f"{folder / name / MANIFEST} is not the one that {folder / MANIFEST} lists: its SHA-256 is {digest}, "
            f"expected {expected}"
        )
    return inner


def _check_held(folder: Path, manifest: Manifest) -> None:
    """Check the content of a folder against its manifest, without reading a file."""
    names = [*manifest.files, *manifest.sealed]
    for parent in sorted({parent for name in names for parent in Path(name).parents if parent.parts}):
        require_folder(folder / parent)  # not a link, which could lead anywhere
    for name, record in manifest.files.items():
        size = require_regular(folder / name)
        if size != record.bytes:
            raise StateError(f"{folder / name} has {size:,} bytes; expected {record.bytes:,}")
    for name, digest in manifest.sealed.items():
        _read_sealed(folder, name, digest)


def _parse(raw: bytes, path: Path, *, kind: str | None) -> Manifest:
    """Parse a manifest and check every field, without touching the disk."""

    def require(holds: bool, where: str, found: Any, expected: str) -> None:
        if not holds:
            raise StateError(f"{path}: {where}: found {shown(found)}, expected {expected}")

    def check_path(where: str, name: str) -> None:
        """Refuse paths that lead out of the folder, or to the manifest itself."""
        bad_parts = {"", ".", ".."} & set(name.split("/"))
        bad = bad_parts or "\\" in name or not name.isprintable() or name in (MANIFEST, COMPLETE)
        require(not bad, where, name, "a relative path inside the folder, without '..', backslashes or links")

    def check_digest(where: str, digest: Any) -> None:
        is_digest = isinstance(digest, str) and SHA256.fullmatch(digest) is not None
        require(is_digest, where, digest, "64 lower-case hex digits")

    content = parse_object(raw, str(path))
    version: Any = content.get("version")
    found: Any = content.get("kind")
    require(content.get("format") == FORMAT, "format", content.get("format"), repr(FORMAT))
    require(type(version) is int and version >= 1, "version", version, f"{VERSION}")
    if version > VERSION:
        raise StateAccessError(
            f"{path}: version: {version}, written by a newer swaft; expected at most {VERSION}. Upgrade swaft"
        )
    if sorted(content) != sorted(FIELDS):
        raise StateError(f"{path}: found the fields {shown(sorted(content))}, expected {', '.join(FIELDS)}")
    require(isinstance(found, str) and kind in (None, found), "kind", found, repr(kind or "a text"))
    for name in ("files", "sealed", "content"):
        require(isinstance(content[name], dict), name, content[name], "an object")
    for name, record in content["files"].items():
        where = f"files: {shown(name)}"
        check_path("files", name)
        is_record = isinstance(record, dict) and record.keys() == {"bytes", "sha256"}
        require(is_record, where, record, "an object of bytes and sha256")
        is_size = type(record["bytes"]) is int and 0 <= record["bytes"] < 1 << 63
        require(is_size, f"{where}: bytes", record["bytes"], "a whole number from 0")
        check_digest(f"{where}: sha256", record["sha256"])
    for name, digest in content["sealed"].items():
        check_path("sealed", name)
        check_digest(f"sealed: {shown(name)}", digest)
        if name in content["files"]:
            raise StateError(f"{path}: {shown(name)} is among both files and sealed folders")
    files = {name: FileRecord(**record) for name, record in content["files"].items()}
    return Manifest(found, files, content["content"], content["sealed"])
