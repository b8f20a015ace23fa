"""One save of a run, tried again and again on a disk that refuses, before it is done in earnest.

All ranks of a real run do this together in the place where the run saves, and write down what was wrong after each
try. Nothing should be, and the run goes on as if it had not happened.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from disk_calls import READING, WRITING, watch

from swaft.errors import StateAccessError, StateError
from swaft.storage import is_complete
from swaft.storage.together import open_together
from swaft.training.run.checkpoints import KIND, choose_checkpoint, find_checkpoints
from swaft.training.run.state import RunState

REFUSALS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""What a disk may say, in turn."""
FOR_EVER = 1_000_000
"""Calls, more than there are in a save."""
SIZES = 12
"""Of free space, from none to nearly enough for a checkpoint."""


def rehearse(step: int, *, kind: str, results: str) -> None:
    """Have this process, a rank, rehearse its save of a step before it does it.

    Args:
        step: at which the run saves anyway, with two checkpoints before it.
        kind: ``calls``: every call to the disk fails once, on every rank; ``some``: a third of those that are
            no write between the first and the last to a file; ``lasting``: every call and all after it; ``looks``:
            every call that only looks; ``space``: the disk of the run folder is nearly full.
        results: file for what was found, one JSON object a try.
    """
    save = RunState.save

    def rehearsed(state: RunState) -> None:
        if state.run.position.step == step:
            tries = Rehearsal(state, partial(save, state), READING if kind == "looks" else WRITING)
            found = list(tries.full_disks() if kind == "space" else tries.failing_calls(kind))
            if state.run.engine.ranks.is_main:
                Path(results).write_text(json.dumps(found))
        save(state)

    RunState.save = rehearsed


class FailingDisk:
    """Refuses calls of this process to the disk under a folder, and notes all that have some names."""

    def __init__(self, folder: Path, names: Collection[str]):
        self.calls: list[str] = []
        self._refused, self._refusal = range(0), 0
        watch(str(folder), names, self._see)

    def refuse(self, refused: range, refusal: int = 0) -> None:
        """Refuse the calls of these numbers, counted from 0 and from now."""
        self.calls, self._refused, self._refusal = [], refused, refusal

    def _see(self, name: str, path: str) -> None:
        self.calls.append(f"{name} {path}")
        if len(self.calls) - 1 in self._refused:
            raise OSError(self._refusal, os.strerror(self._refusal), path)


class Rehearsal:
    """Tries of one save.

    Args:
        state: of the run.
        save: writes the checkpoint that is rehearsed.
        names: of the calls that may fail.
    """

    def __init__(self, state: RunState, save: Callable[[], None], names: Collection[str]):
        self._ranks, self._save, self._folder = state.run.engine.ranks, save, state.run.folder.path
        self._new = self._folder / f"checkpoint-{state.run.position.step}"
        self._old = find_checkpoints(self._folder)
        self._kept = self._folder.parent / "kept"
        self._disk = FailingDisk(self._folder, names)
        if self._ranks.is_main:
            for each in self._old:
                shutil.copytree(each, self._kept / each.name, copy_function=os.link)
        self._ranks.gather(None)

    def failing_calls(self, kind: str) -> Iterator[dict[str, Any]]:
        """Let each call of each rank fail (collective)."""
        self._disk.refuse(range(0))
        self._save()
        calls = self._ranks.gather(self._disk.calls)
        self._put_back()
        for rank, of_rank in enumerate(calls):
            for number in _third(of_rank) if kind == "some" else range(len(of_rank)):
                if rank == self._ranks.rank:
                    refused = range(number, FOR_EVER if kind == "lasting" else number + 1)
                    self._disk.refuse(refused, REFUSALS[number % len(REFUSALS)])
                yield {
                    "rank": rank,
                    "call": of_rank[number],
                    **self._try(lambda: self._disk.refuse(range(0))),
                }

    def full_disks(self) -> Iterator[dict[str, Any]]:
        """Let the disk have room for a part of the checkpoint (collective)."""
        free = _free(self._folder)
        self._save()
        needed = free - _free(self._folder)  # the oldest has been deleted, but its files are kept
        self._put_back()
        filler = self._folder.parent / "filler"
        for size in range(SIZES):
            if self._ranks.is_main:
                _fill(filler, _free(self._folder) - needed * size // SIZES)
            self._ranks.gather(None)
            yield {"free": f"{size}/{SIZES} of {needed:,} bytes", **self._try(partial(self._empty, filler))}

    def _try(self, mend: Callable[[], None]) -> dict[str, Any]:
        """Save, mend the disk, and tell what was said and what is wrong now."""
        said = ""
        try:
            self._save()
        except Exception as error:
            said = f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
        everyone = self._ranks.gather(said)
        gc.collect()  # an error that still holds a file open holds its room on the disk
        mend()
        left = "nothing"
        if self._new.exists():
            left = "whole" if is_complete(self._new) else "incomplete"
        left = self._ranks.gather(left)[0]
        wrong = list(self._wrong(everyone, left))
        self._put_back()
        return {"said": said, "left": left, "wrong": wrong}

    def _wrong(self, said: list[str], left: str) -> Iterator[str]:
        if len(set(said)) > 1:
            yield f"the ranks said different things: {said}"
        if said[0] and not said[0].startswith((StateError.__name__, StateAccessError.__name__)):
            yield f"it was no StateError: {said[0]}"
        if not said[0] and left != "whole":
            yield "nobody said that there is no checkpoint"
        chosen = choose_checkpoint("auto", self._folder, self._ranks)
        expected = self._new if left == "whole" else self._old[0]
        if chosen is None or chosen.path != expected:
            yield f"a run would go on from {chosen}, not from {expected}"
        for each in self._old if left != "whole" else ():
            open_together(self._ranks, each, kind=KIND)
        if left == "incomplete":
            self._save()
            open_together(self._ranks, self._new, kind=KIND)

    def _put_back(self) -> None:
        """Have the checkpoints that there were before the save."""
        self._ranks.gather(None)
        if self._ranks.is_main:
            shutil.rmtree(self._new, ignore_errors=True)
            for each in self._old:
                if not is_complete(each):
                    shutil.rmtree(each, ignore_errors=True)
                    shutil.copytree(self._kept / each.name, each, copy_function=os.link)
        self._ranks.gather(None)

    def _empty(self, filler: Path) -> None:
        if self._ranks.is_main:
            filler.unlink()
        self._ranks.gather(None)


def _third(calls: list[str]) -> list[int]:
    """Numbers of every third call, where of writes to one file only the first and the last count."""
    kept = [n for n, call in enumerate(calls) if calls[max(n - 1, 0) : n + 2] != [call] * 3]
    return kept[::3]


def _free(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def _fill(path: Path, size: int) -> None:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
