"""Files that are complete or absent, and files that are safe to open.

Whatever the system refuses becomes a :class:`StateError` that names the file and the system's reason, with the
`OSError` as its cause.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from swaft.errors import StateAccessError, StateError

TEMPORARY = ".tmp"
"""Suffix of a file's name while it is being written. Leftovers from a crash are ignored."""

_LOST = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Error codes for files that are damaged or gone, not merely inaccessible."""


@dataclass(frozen=True)
class FileRecord:
    """The expected size and digest of a file."""

    bytes: int
    """Its size."""
    sha256: str
    """Its tree digest, as :mod:`swaft.storage.hashing` describes it: 64 lower-case hex digits."""


@contextmanager
def explained(path: str | PathLike[str], doing: str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a :class:`StateAccessError`: "PATH could not be DOING: reason".

    If the data is lost or the file is missing, it is a plain `StateError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        kind = StateError if error.errno in _LOST else StateAccessError
        raise kind(f"{path} could not be {doing}: {reason}") from error


def open_regular(path: str | PathLike[str]) -> BinaryIO:
    """Open an existing regular file for reading; never blocks, never follows a link.

    Raises:
        StateError: it is missing, a symbolic link, a folder, a pipe, a device or a socket.
    """
    require_regular(path)  # before opening: opening a device can have side effects
    with explained(path, "opened"):
        return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def require_regular(path: str | PathLike[str]) -> int:
    """Size of a regular file, without opening it.

    Raises:
        StateError: it is missing or not a regular file.
    """
    return _require(path, "a regular file").st_size


def require_folder(path: str | PathLike[str]) -> None:
    """Raise a `StateError` unless a path is a folder; a link to a folder is refused, too."""
    _require(path, "a folder")


def _require(path: str | PathLike[str], kind: str) -> os.stat_result:
    kinds = {
        stat.S_ISREG: "a regular file",
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    facts = status(path)
    if facts is None:
        raise StateError(f"{path} is missing; expected {kind}")
    found = next((kinds[test] for test in kinds if test(facts.st_mode)), "a device")
    if found != kind:
        raise StateError(f"{path} is {found.replace('regular ', '')}; expected {kind}")
    return facts


def status(path: str | PathLike[str]) -> os.stat_result | None:
    """`os.lstat`; None if nothing has this name."""
    with explained(path, "looked at"):
        try:
            return os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:  # a NUL byte, or a character not allowed in file names
            raise StateError(f"{os.fspath(path)!r} is not a valid file name: {error}") from error


def read_whole(path: str | PathLike[str], *, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        limit: maximum size in bytes.

    Raises:
        StateError: it is not a regular file, is larger than the limit, or could not be read.
    """
    with open_regular(path) as file, explained(path, "read"):
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise StateError(f"{path} has {size:,} bytes; expected at most {limit:,}")
        return file.read(size)


@contextmanager
def place_beside(path: Path) -> Iterator[Path]:
    """An empty folder next to a path, with a unique name; deleted when the block ends.

    Raises:
        StateError: it could not be created.
    """
    place = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    with explained(place, "made"):
        path.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def is_free(path: Path) -> bool:
    """Whether a new folder may take this name: nothing has it, or only an empty folder."""
    with explained(path, "looked at"):
        return status(path) is None or (not path.is_symlink() and path.is_dir() and not any(path.iterdir()))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, with the same name but inside a hidden folder next to the path. When the block ends,
    it is synced to disk and moved into place; an exception deletes it. Its tensors can be read by whoever can read
    its other files.

    Raises:
        StateError: the name is taken at the end, or the folder could not be created or renamed.
    """
    existed = path.exists()
    with place_beside(path) as place:
        unfinished = place / path.name
        with explained(unfinished, "made"):
            unfinished.mkdir()
        yield unfinished
        with suppress(OSError):  # some file systems have no modes
            readable = unfinished.stat().st_mode & 0o666
            # safetensors itself lets only their owner read them.
            for tensors in unfinished.rglob("*.safetensors"):
                tensors.chmod(readable)
        sync_tree(unfinished)
        if not is_free(path):
            raise StateError(f"{path} is there already; nothing was changed in it")
        with explained(path, "named"):
            if not existed:
                path.mkdir()  # fails if somebody else has taken the name meanwhile
            try:
                os.rename(unfinished, path)  # replaces an empty folder, otherwise fails
            except BaseException:
                if not existed:
                    with suppress(OSError):
                        path.rmdir()
                raise
    sync_folder(path.parent)


def beside(path: Path, what: str) -> Path:
    """Path of the folder that will take a path's name (``new``), or that had it before (``old``)."""
    return path.with_name(f".{path.name}.{what}")


def standing(path: Path) -> Path:
    """The folder with this name, or the old one if :func:`replace_folder` was interrupted between two renames."""
    old = beside(path, "old")
    return old if status(path) is None and status(old) is not None else path


def replace_folder(new: Path, path: Path) -> None:
    """Move a folder to the name of another one, which may not exist, and delete that one.

    The system exchanges the two names in one step. If it cannot (NFS), the name is missing for a moment, and
    :func:`standing` finds the old folder.

    Raises:
        OSError: a rename failed; the old folder is in its place, or where `standing` finds it.
    """
    old = beside(path, "old")
    if status(path) is None:
        os.replace(new, path)
    elif _exchange(new, path):
        old = new
    else:
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(new, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; returns False if the system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextmanager
def new_file(path: str | PathLike[str], *, replaces: bool = False) -> Iterator[int]:
    """Descriptor of a file to write. When the block ends without an error, the file is synced and gets its name.

    Until then it has a temporary name next to the final one, replacing any leftover from a crash.

    Args:
        path: of the file, in an existing folder.
        replaces: whether it may replace an existing file, which keeps its name until then.

    Raises:
        StateError: the name is taken, before or after the block, or the system refused a call, also one inside the
            block.
    """
    path, temporary = Path(path), Path(f"{os.fspath(path)}{TEMPORARY}")
    if not replaces:
        _refuse_existing(path)
    with explained(temporary, "created"):
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
    try:
        with explained(path, "written"):
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if not replaces:
                _refuse_existing(path)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def _refuse_existing(path: Path) -> None:
    if status(path) is not None:
        raise StateError(f"{path} exists already; nothing was changed there. Name another, or delete it")


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte, even if the system takes only a few at a time."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def write_durably(path: str | PathLike[str], data: bytes) -> None:
    """Write a small file atomically: even after a crash, its name refers to a complete file, the old or the new.

    Raises:
        StateError: it could not be written; the old file, if any, is still there.
    """
    with new_file(path, replaces=True) as descriptor:
        write_all(descriptor, data)


def sync_file(path: str | PathLike[str]) -> None:
    """Wait until a file's content is on the disk."""
    with open_regular(path) as file, explained(path, "synced"):
        os.fsync(file.fileno())


def sync_tree(folder: str | PathLike[str]) -> None:
    """Wait until everything in a folder and its subfolders is on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(place)


def sync_folder(path: str | PathLike[str]) -> None:
    """Wait until the names in a folder are on the disk."""
    with explained(path, "synced"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems do not support this for folders
                raise
        finally:
            os.close(descriptor)
