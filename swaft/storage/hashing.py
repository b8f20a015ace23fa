"""The digest of a file: a tree of depth one, so that many threads can work on it.

It is the SHA-256 of the SHA-256 digests, one after the other, of the file's blocks of 4 MiB (the last may be
shorter):

    outer = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            outer.update(hashlib.sha256(block).digest())
    print(outer.hexdigest())

Of an empty file that is the SHA-256 of nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from typing import Any

from swaft.storage.files import FileRecord, explained, open_regular

BLOCK_BYTES = 1 << 22
"""Bytes of a block; part of the format."""

SMALL = 1 << 16
"""Pieces below this many bytes are copied together: a block is of few pieces, whatever it comes in."""

Pieces = list[memoryview | bytearray]


class BlockHasher:
    """Digests bytes as they come, in threads of its own (hashlib lets go of the interpreter lock).

    At most two blocks a thread are under way. What is given to :meth:`update` is not copied, so it must stay as it
    is until :meth:`drain` or :meth:`hexdigest` returns.

    Args:
        threads: how many; None: as many as there are processors, four at most.
    """

    def __init__(self, threads: int | None = None):
        threads = threads or min(4, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="swaft-hash")
        self._most = 2 * threads
        self._under_way: deque[Future[bytes]] = deque()
        self._outer = hashlib.sha256()
        self._bytes = 0
        self._start_block()

    def update(self, buffer: bytes | bytearray | memoryview) -> None:
        """Take the next bytes, any number of them, of a contiguous buffer."""
        view = memoryview(buffer)
        if not view.nbytes:
            return
        view = view.cast("B")
        self._bytes += view.nbytes
        while view.nbytes:
            piece, view = view[: self._room], view[self._room :]
            self._room -= piece.nbytes
            if piece.nbytes >= SMALL:
                self._pieces.append(piece)
            elif self._pieces and isinstance(self._pieces[-1], bytearray):
                self._pieces[-1] += piece
            else:
                self._pieces.append(bytearray(piece))
            if not self._room:
                self._close_block()

    def drain(self) -> None:
        """Wait until no buffer that was given is looked at any more."""
        while self._under_way:
            self._outer.update(self._under_way.popleft().result())
        _digest(self._block, self._pieces)
        self._pieces = []

    def hexdigest(self) -> str:
        """The tree digest of all bytes given; the last thing to ask for."""
        if self._room < BLOCK_BYTES:
            self._close_block()
        self.drain()
        return self._outer.hexdigest()

    def record(self) -> FileRecord:
        """Size and digest of all bytes given, as :meth:`hexdigest`."""
        return FileRecord(self._bytes, self.hexdigest())

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> BlockHasher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_block(self) -> None:
        self._block, self._pieces, self._room = hashlib.sha256(), Pieces(), BLOCK_BYTES

    def _close_block(self) -> None:
        if len(self._under_way) >= self._most:
            self._outer.update(self._under_way.popleft().result())
        self._under_way.append(self._pool.submit(_digest, self._block, self._pieces))
        self._start_block()


def hash_file(path: str | PathLike[str], *, threads: int | None = None) -> FileRecord:
    """Size and digest of a file, read once, in memory of a few blocks.

    Args:
        path: a regular file.
        threads: as of :class:`BlockHasher`.

    Raises:
        StateError: it is missing, anything but a regular file, or could not be read.
    """
    descriptor, _ = open_regular(path)
    try:
        with explained(path, "read"), BlockHasher(threads) as hasher:
            while block := os.read(descriptor, BLOCK_BYTES):
                hasher.update(block)
            return hasher.record()
    finally:
        os.close(descriptor)


def _digest(block: Any, pieces: Iterable[memoryview | bytearray]) -> bytes:
    for piece in pieces:
        block.update(piece)
    return block.digest()
