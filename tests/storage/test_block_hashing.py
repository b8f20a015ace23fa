from __future__ import annotations

import hashlib
import os
import random
import tracemalloc

import pytest

from swaft.errors import StateError
from swaft.storage.hashing import BLOCK_BYTES, BlockHasher, hash_file

pytestmark = pytest.mark.unit

SIZES = [0, 1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 12345]


def as_documented(data: bytes) -> str:
    outer = hashlib.sha256()
    for start in range(0, len(data), BLOCK_BYTES):
        outer.update(hashlib.sha256(data[start : start + BLOCK_BYTES]).digest())
    return outer.hexdigest()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_digest_of_a_file_is_the_documented_one(tmp_path, monkeypatch, size, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    record = hash_file(tmp_path / "file")
    assert (record.bytes, record.sha256) == (size, as_documented(data))


@pytest.mark.parametrize("seed", range(6))
def test_the_digest_does_not_depend_on_the_pieces_that_bytes_come_in(seed):
    draw = random.Random(seed)
    data = draw.randbytes(2 * BLOCK_BYTES + 777)
    with BlockHasher() as hasher:
        position = 0
        while position < len(data):
            size = draw.choice([0, 1, 17, 5000, 1 << 16, 700_001, BLOCK_BYTES])
            hasher.update(data[position : position + size])
            position += size
            if draw.random() < 0.3:
                hasher.drain()
        assert hasher.hexdigest() == as_documented(data)


@pytest.mark.parametrize("size", [5, 1 << 16, BLOCK_BYTES, 2 * BLOCK_BYTES + 5])
def test_a_buffer_may_change_after_it_was_drained(size):
    buffer = bytearray(b"a" * size)
    with BlockHasher() as hasher:
        for letter in b"abc":
            buffer[:] = bytes([letter]) * size
            hasher.update(buffer)
            hasher.drain()
        assert hasher.hexdigest() == as_documented(b"a" * size + b"b" * size + b"c" * size)


def test_a_file_is_hashed_in_memory_of_a_few_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    os.truncate(os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY), 40 * BLOCK_BYTES)
    tracemalloc.start()
    hash_file(tmp_path / "file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 7 * BLOCK_BYTES


def test_single_bytes_are_hashed_in_memory_of_a_few_blocks():
    tracemalloc.start()
    with BlockHasher() as hasher:
        hasher.update(b"x" * (1 << 16))
        for _ in range(300_000):
            hasher.update(b"x")
        digest = hasher.hexdigest()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert digest == as_documented(b"x" * ((1 << 16) + 300_000))
    assert peak < 4 * BLOCK_BYTES


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StateError, match="nothing-here is missing; expected a regular file"):
        hash_file(tmp_path / "nothing-here")
