"""The vectors of one rule in host memory: as long as this rank's shard, moved by a plan, read out as a sum.

Knows neither engines nor rules: it gets the numbers of a `Plan` and the addresses of a member.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from swaft.averaging import native
from swaft.averaging.host.machine import Workers
from swaft.averaging.rules.base import DEFAULT, Plan, Readout, Update
from swaft.errors import AveragingError
from swaft.storage.files import write_all

Table = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Runs of one member: byte address, first element in the shard, number of elements; int64 each."""
WIPE_ON_FORK = 18
"""Advice of Linux's madvise: a forked process finds zeros in this memory, and shares none of its pages."""


@dataclass
class Lane:
    """One fp32 vector, with a bf16 compensation in the compensated form. Read-only once it is `finished`."""

    mean: Tensor
    """(numel,), fp32."""
    compensation: Tensor | None
    """(numel,), bf16; None for copies and in the plain form."""


class Lanes:
    """All lanes of one rule on one rank.

    Args:
        plan: the rule's plan.
        numel: elements of the shard.
        workers: do the arithmetic.
        compensated: keep running means to 32 bits (6 bytes per element) instead of 24 (4 bytes).
        spill: folder that finished lanes are moved to; None keeps them in memory.
    """

    def __init__(
        self, plan: Plan, numel: int, workers: Workers, *, compensated: bool, spill: Path | None = None
    ):
        self.plan = plan
        self.count = 0
        self._torn: str | None = None
        self._process = os.getpid()
        self._numel = numel
        self._workers = workers
        self._compensated = compensated
        self._spill = spill
        self._lanes: dict[int, Lane] = {}

    def begin(self) -> tuple[Update, ...]:
        """Begin the next member and return its updates; :meth:`take` adds its elements, :meth:`end` closes it."""
        updates = self.plan.updates(self.count)
        self._torn = (
            f"member {self.count + 1} of this average was taken in only in part, because averaging failed"
        )
        for update in updates:
            if update.lane not in self._lanes:
                self._lanes[update.lane] = self.empty_lane(update.lane)
        return updates

    def take(self, updates: Iterable[Update], tables: Sequence[Table]) -> None:
        """Move the lanes by the member's elements that the tables list, one table per thread."""
        for update in updates:
            if update.source is None:
                lane = self._lanes[update.lane]
                vectors = lane.mean.numpy(), bits(lane.compensation)
                self._workers.run(native.update, [(*table, *vectors, update.weight) for table in tables])

    def end(self, updates: Iterable[Update]) -> None:
        """Close the member: copy between lanes, and move finished lanes to disk."""
        for update in updates:
            if update.source is not None:
                self._lanes[update.lane].mean.copy_(self._lanes[update.source].mean)
        self.count += 1
        self._torn = None
        for lane in self.plan.finished(self.count - 1):
            self._put_away(lane)

    def readout(self, chosen: Readout = DEFAULT) -> list[tuple[float, Lane]]:
        """The average as (coefficient, lane) pairs; lanes on disk are mapped, not read.

        Raises:
            AveragingError: an update was interrupted, or this process is a fork of the one that averages.
        """
        self._require_whole()
        coefficients = self.plan.readout(self.count, chosen)
        return [(coefficient, self._lanes[i]) for i, coefficient in sorted(coefficients.items())]

    def shard(self, chosen: Readout = DEFAULT) -> Tensor:
        """The average: (numel,), fp32. If it is a single lane, that lane is returned, not a copy."""
        readout = self.readout(chosen)
        if len(readout) == 1 and readout[0][0] == 1.0:
            return readout[0][1].mean
        result = torch.from_numpy(np.empty(self._numel, np.float32))
        block = 1 << 20  # bounds the float64 scratch
        parts = [(first, min(first + block, self._numel)) for first in range(0, self._numel, block)]
        self._workers.run(lambda first, last: _combine(readout, result[first:last], first, last), parts)
        return result

    def held(self) -> dict[int, Lane]:
        """Every existing lane, by its number; those on disk are mapped, not read.

        Raises:
            AveragingError: as for :meth:`readout`.
        """
        self._require_whole()
        return dict(sorted(self._lanes.items()))

    def empty_lane(self, index: int) -> Lane:
        """Allocate an unfilled lane."""
        compensation = None
        if self.plan.lanes[index] and self._compensated:
            compensation = torch.from_numpy(_unshared(self._numel, np.uint16)).view(torch.bfloat16)
        return Lane(torch.from_numpy(_unshared(self._numel, np.float32)), compensation)

    def restore(self, count: int, lanes: Iterable[tuple[int, Lane]]) -> None:
        """Resume from ``count`` members with these lanes, read one at a time, replacing all existing lanes."""
        self._lanes = {}
        self._torn = "a state of this average was read only in part, because the rest is damaged"
        self.count = count
        finished = {lane for n in range(min(count, self.plan.num_members)) for lane in self.plan.finished(n)}
        for index, lane in lanes:
            self._lanes[index] = lane
            if index in finished:
                self._put_away(index)
        self._torn = None

    def _require_whole(self) -> None:
        if os.getpid() != self._process:
            raise AveragingError(
                f"the averages are in the memory of process {self._process}; this process is a fork, which has no "
                "copy of them. Read them in the first one"
            )
        if self._torn:
            raise AveragingError(
                f"{self._torn} (see the error before this one), so it is neither the old average nor the new one"
            )

    def _put_away(self, index: int) -> None:
        if self._spill is None:
            return
        lane = self._lanes[index]
        compensation = None if lane.compensation is None else moved_to_disk(lane.compensation, self._spill)
        self._lanes[index] = Lane(moved_to_disk(lane.mean, self._spill), compensation)


def _combine(readout: list[tuple[float, Lane]], result: Tensor, first: int, last: int) -> None:
    total = np.zeros(last - first)
    for coefficient, lane in readout:
        words = bits(lane.compensation)[first:last]
        native.accumulate(total, coefficient, lane.mean.numpy()[first:last], words)
    result.numpy()[:] = total  # numpy rounds to nearest even, once


def _unshared(numel: int, dtype: type[np.generic]) -> np.ndarray:
    """Allocate an unfilled vector, of which forked processes have no copy.

    Otherwise the workers of a data loader would keep its pages as they were, and the next update would take as much
    memory again.
    """
    if sys.platform != "linux":
        return np.empty(numel, dtype)
    num_bytes = numel * np.dtype(dtype).itemsize
    room = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, WIPE_ON_FORK):  # huge pages: the loops run through gigabytes
        with suppress(OSError):  # a kernel without it
            room.madvise(advice)
    return np.frombuffer(room, dtype, numel)


def bits(tensor: Tensor | None) -> np.ndarray:
    """The words of a bf16 tensor as a uint16 view; empty for None."""
    return np.empty(0, np.uint16) if tensor is None else tensor.view(torch.uint16).numpy()


def moved_to_disk(tensor: Tensor, folder: Path) -> Tensor:
    """Return the same values, mapped from a new unnamed file that vanishes with the process.

    Args:
        tensor: (numel,), fp32 or bf16, in host memory.
        folder: for the file.

    Raises:
        AveragingError: the file could not be written.
    """
    if not tensor.numel():  # an empty file cannot be mapped
        return tensor
    try:
        # Written, not copied into the map: then a full disk raises an error instead of killing the process.
        with TemporaryFile(dir=folder, buffering=0) as file:
            write_all(file.fileno(), tensor.view(torch.uint8).numpy().data)
            return torch.from_numpy(np.memmap(file, np.uint8, mode="c")).view(tensor.dtype)
    except OSError as error:
        raise AveragingError(
            f"averaging.spill_dir: {folder} could not take a finished part: {error}"
        ) from error


def require_writable(folder: Path) -> None:
    """Raise an `AveragingError` unless files can be created in a folder; the folder is created if needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise AveragingError(
            f"averaging.spill_dir: {folder} cannot be written to ({error}); name another folder"
        ) from error
