"""Small file systems in memory, to be filled, made larger and made read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def mount(*words: str) -> str:
    """Call mount; returns what is wrong, or ""."""
    try:
        return subprocess.run(["mount", *words], capture_output=True, text=True, timeout=20).stderr.strip()
    except FileNotFoundError as error:
        return str(error)


@contextmanager
def file_system(folder: Path, *, size: str) -> Iterator[str]:
    """Make a folder with a file system of its own for the time of a context; gives why it cannot be, or ""."""
    folder.mkdir()
    if wrong := mount("-t", "tmpfs", "-o", f"size={size}", "none", str(folder)):
        yield f"no file system can be mounted here: {wrong}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)
