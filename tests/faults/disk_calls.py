"""The calls by which this process touches the disk under a folder, each seen before it happens."""

from __future__ import annotations

import builtins
import io
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

ENDING = ("fsync", "replace", "unlink", "rmdir")
"""Calls by which a checkpoint comes to be, or goes."""
WRITING = (*ENDING, "open", "write", "sendfile", "mkdir", "rename", "link")
"""All calls that change what is on the disk."""
READING = ("lstat", "listdir", "scandir")
"""Calls that look."""

See = Callable[[str, str], None]
"""Is told the name of a call and the path it is about."""


def watch(folder: str, names: Collection[str], see: See) -> None:
    """From now on tell `see` of the calls with these names that are about anything in a folder."""
    for name in names:
        setattr(os, name, _told(name, getattr(os, name), folder, see))
    if "open" in names:
        builtins.open = io.open = _opener(builtins.open, folder, see)


def count_to(numbers: Collection[int], act: Callable[[], None]) -> See:
    """Call `act` at the calls with these numbers, counted from one."""
    count, lock = 0, threading.Lock()

    def see(name: str, path: str) -> None:
        nonlocal count
        with lock:
            count += 1
            due = count in numbers
        if due:
            act()

    return see


def _told(name: str, call: Any, folder: str, see: See) -> Any:
    def before(*arguments: Any, **options: Any) -> Any:
        path = _path(arguments[0] if arguments else ".", options.get("dir_fd"))
        if _inside(path, folder) and (name != "open" or _writes(*arguments, **options)):
            see(name, path)
        return call(*arguments, **options)

    return before


def _opener(call: Any, folder: str, see: See) -> Any:
    """Python's `open`, with the writes of binary files seen where its buffer goes to the disk."""

    class Seen(io.FileIO):
        def write(self, data: Any, /) -> int:
            see("write", os.fspath(self.name))
            return super().write(data)

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax") or not _inside(_path(file), folder):
            return call(file, mode, *arguments, **options)
        see("open", _path(file))
        if mode == "wb":
            return io.BufferedWriter(Seen(file, "w"))
        return call(file, mode, *arguments, **options)

    return opened


def _writes(path: Any, flags: int, *arguments: Any, **options: Any) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _path(target: Any, folder: int | None = None) -> str:
    """The path of what a call is about: an open file, or a name in a folder that is open."""
    if isinstance(target, int):
        return _of_open(target)
    path = Path(os.fsdecode(target))
    return str(path if folder is None or path.is_absolute() else Path(_of_open(folder)) / path)


def _inside(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def _of_open(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
