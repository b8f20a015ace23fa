"""The digest of a file, a hash tree of depth one: hashing in one piece would be slower than writing to a fast disk.

It is the SHA-256 of the concatenated SHA-256 digests of the file's blocks of 4 MiB (the last may be shorter):

    outer = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            outer.update(hashlib.sha256(block).digest())
    print(outer.hexdigest())

For an empty file, this is the SHA-256 of no bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import PathLike

from swaft.storage.files import FileRecord, explained, open_regular

BLOCK_BYTES = 1 << 22
"""Bytes per block; part of the format."""


class BlockHasher:
    """Digests bytes as they arrive: whole blocks in threads (hashlib releases the GIL), partial blocks immediately.

    At most two blocks per thread are in progress. Buffers given to :meth:`update` are not copied, so they must not
    change until :meth:`drain` or :meth:`hexdigest` returns.
    """

    def __init__(self) -> None:
        threads = min(4, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="swaft-hash")
        self._most = 2 * threads
        self._under_way: deque[Callable[[], bytes]] = deque()
        self._outer, self._part, self._bytes = hashlib.sha256(), hashlib.sha256(), 0

    @property
    def room(self) -> int:
        """Bytes until the end of the current block."""
        return BLOCK_BYTES - self._bytes % BLOCK_BYTES

    def update(self, buffer: bytes | bytearray | memoryview) -> None:
        """Add the next bytes, any number of them, from a contiguous buffer."""
        view = memoryview(buffer)
        view = view.cast("B") if view.nbytes else view
        while view.nbytes:
            piece, view = view[: self.room], view[self.room :]
            self._bytes += piece.nbytes
            if piece.nbytes == BLOCK_BYTES:
                self._end_block(self._pool.submit(_sha256, piece).result)
                continue
            self._part.update(piece)
            if self.room == BLOCK_BYTES:
                self._end_block(self._part.digest)
                self._part = hashlib.sha256()

    def drain(self) -> None:
        """Wait until no buffer that was given is in use any more."""
        while self._under_way:
            self._outer.update(self._under_way.popleft()())

    def hexdigest(self) -> str:
        """The tree digest of all bytes given; call it last."""
        if self.room < BLOCK_BYTES:
            self._end_block(self._part.digest)
        self.drain()
        return self._outer.hexdigest()

    def record(self) -> FileRecord:
        """Size and digest of all bytes given; call it last."""
        return FileRecord(self._bytes, self.hexdigest())

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> BlockHasher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _end_block(self, digest: Callable[[], bytes]) -> None:
        if len(self._under_way) >= self._most:
            self._outer.update(self._under_way.popleft()())
        self._under_way.append(digest)


def hash_file(path: str | PathLike[str]) -> FileRecord:
    """Size and digest of a file, read once, using the memory of a few blocks.

    Args:
        path: a regular file.

    Raises:
        StateError: it is missing, not a regular file, or could not be read.
    """
    with open_regular(path) as file, explained(path, "read"), BlockHasher() as hasher:
        while block := file.read(BLOCK_BYTES):
            hasher.update(block)
        return hasher.record()


def _sha256(block: memoryview) -> bytes:
    return hashlib.sha256(block).digest()
