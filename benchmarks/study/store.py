"""Rows on disk, one JSON line per readout, and claims on cells, for any number of processes at once.

A cell's rows are appended in one write under a lock, and each records how many there are (``of``), so a cell counts
only once all of them are there. Readers skip a truncated line, and the next writer removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.study.numerics import kind_of

Row = dict[str, Any]

CLAIMS = ".claims"
"""An empty file in which a process locks one byte per cell. The kernel frees the locks of a dead process."""


def results_folder() -> Path:
    """Where the rows are: `$SWAFT_STUDY`, else benchmarks/results/study in this checkout."""
    here = Path(__file__).parents[1] / "results" / "study"
    return Path(os.environ.get("SWAFT_STUDY", here))


def read_rows(folder: Path) -> list[Row]:
    """Every complete row, the latest for each cell, readout, fingerprint and kind of machine, in this order.
    A failure is dropped once its cell has rows.
    """
    found: dict[tuple[str, str, str, str], Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in _whole_lines(path):
            found[row["cell"], row["readout"], row["fingerprint"], kind_of(row)] = row
    made = {(cell, *source) for (cell, _, *source), row in found.items() if "failed" not in row}
    return [
        row for (cell, _, *source), row in sorted(found.items())
        if "failed" not in row or (cell, *source) not in made
    ]  # fmt: skip


def finished(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """(cell, fingerprint) of the cells that have all their rows, or are recorded as failed.

    Args:
        rows: from one kind of machine.
    """
    counts: dict[tuple[str, str], int] = {}
    done = set()
    for row in rows:
        key = row["cell"], row["fingerprint"]
        counts[key] = counts.get(key, 0) + 1
        if "failed" in row or counts[key] == row["of"]:
            done.add(key)
    return done


def append(folder: Path, name: str, rows: list[Row]) -> None:
    """Append the rows of a cell to a file; readers see all of them or none.

    Args:
        folder: created if it is missing.
        name: name of the file, without extension.
        rows: of one cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
    with (folder / f"{name}.jsonl").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END) and not _ends_a_line(file):  # a writer was interrupted
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def claim(folder: Path, cell: str) -> Iterator[bool]:
    """Claim a cell on this machine if it is free; yields whether the claim succeeded.

    The lock excludes other processes, not threads of the same one; a dead process holds none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = int.from_bytes(hashlib.sha256(cell.encode()).digest()[:7], "big")
    with (folder / CLAIMS).open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            yield False
        else:
            yield True  # closing the file frees the lock


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _whole_lines(path: Path) -> Iterator[Row]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"cell", "readout", "fingerprint", "machine", "of"} <= row.keys():
            yield row
