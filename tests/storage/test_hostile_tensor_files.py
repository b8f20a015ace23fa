"""Files that somebody damaged or made up: refused with words, without hanging, executing or allocating."""

from __future__ import annotations

import json
import os
import random
import socket
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from swaft.errors import StateError
from swaft.storage.tensor_file import TensorFile

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def file_of(path, header, buffer=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + buffer)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "no object": (b"[]      ", "invalid type: sequence"),
    "no JSON": (b"{nonsense", "invalid JSON"),
    "no UTF-8": (b'{"\xff": 1}', "invalid UTF-8"),
    "text behind the object": (b"{} {}", "trailing characters"),
    "a field twice": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "duplicate field `dtype`"),
    "nested without end": (b'{"a":' + b"[" * 100_000, "recursion limit exceeded"),
    "NaN": (b'{"a": NaN}', "invalid JSON"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "number out of range"),
    "an entry that is no object": ({"a": 3}, "invalid type: integer `3`"),
    "a field too few": ({"a": {"dtype": "F32", "shape": [2]}}, "missing field `data_offsets`"),
    "an unknown dtype": ({"a": entry("F33")}, "unknown variant `F33`"),
    "a dtype that torch lacks": (
        {"a": entry("F4", [16])},
        "'a': dtype: found 'F4', expected one",
    ),
    "a dtype that is a list": ({"a": entry(["F32"])}, "invalid JSON"),
    "another dtype": ({"a": entry("F16")}, "invalid shape, data type, or offset for tensor"),
    "a negative size": ({"a": entry(shape=[-2])}, "integer `-2`, expected usize"),
    "a true size": ({"a": entry(shape=[True, 2])}, "boolean `true`, expected usize"),
    "a broken size": ({"a": entry(shape=[2.0])}, "floating point `2.0`, expected usize"),
    "a size above 64 bits": ({"a": entry(shape=[1 << 70])}, "expected usize"),
    "a product above 64 bits": ({"a": entry(shape=[1 << 40, 1 << 40])}, "overflow computing buffer size"),
    "a product above 64 bits, then none": (
        {"a": entry(shape=[1 << 62, 4, 0], offsets=[0, 0])},
        "overflow computing buffer size",
    ),
    "huge sizes by the thousand": ({"a": entry(shape=[(1 << 63) - 1] * 10_000)}, "overflow computing"),
    "offsets backwards": ({"a": entry(offsets=[8, 0])}, "invalid offset for tensor `a`"),
    "a negative offset": ({"a": entry(offsets=[-8, 0])}, "integer `-8`, expected usize"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, "invalid JSON"),
    "10 GB claimed": ({"a": entry("U8", [10**10], [0, 10**10])}, "file not fully covered"),
    "a hole": (
        {"a": entry("U8", [4], [0, 4]), "b": entry("U8", [3], [5, 8])},
        "invalid offset for tensor `b`",
    ),
    "an overlap": (
        {"a": entry("U8", [5], [0, 5]), "b": entry("U8", [4], [4, 8])},
        "invalid offset for tensor `b`",
    ),
    "bytes left over": ({"a": entry("U8", [4], [0, 4])}, "file not fully covered"),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "a": entry()}, "expected a string"),
    "metadata that is a list": ({"__metadata__": [], "a": entry()}, "expected a map"),
}
"""Header, and what is said of it: most by the safetensors library, in a message of ours that names the file."""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_made_up_header_is_refused_and_the_field_named(tmp_path, name):
    header, message = HOSTILE[name]
    path = file_of(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(StateError, match=message) as error:
        TensorFile(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 500


@pytest.mark.parametrize("length", [9, 1 << 20, 10 * 10**9, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_allocated(tmp_path, length):
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{}      ")
    tracemalloc.start()
    with pytest.raises(StateError, match=r"not a complete safetensors file: .*header"):
        TensorFile(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_header_larger_than_the_format_allows_is_refused_in_a_file_that_could_hold_it(tmp_path):
    path = file_of(tmp_path / "x", b"{")
    os.truncate(path, 10 * 10**9)
    with path.open("r+b") as file:
        file.write((10**9).to_bytes(8, "little"))
    with pytest.raises(StateError, match="header too large"):
        TensorFile(path)


def test_a_slice_of_a_huge_tensor_takes_the_memory_of_the_slice(tmp_path):
    path = file_of(tmp_path / "x", {"a": entry("F32", [10**10], [0, 4 * 10**10])})
    os.truncate(path, path.stat().st_size + 4 * 10**10)
    with TensorFile(path) as file:
        assert torch.equal(file.read("a", 9_999_999_990), torch.zeros(10))


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_a_file_too_short_for_a_header_is_refused(tmp_path, size):
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(StateError, match="not a complete safetensors file"):
        TensorFile(tmp_path / "x")


def test_every_truncation_is_refused(tmp_path):
    save_file({"a": torch.ones(5), "b": torch.ones(2, 3)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(StateError):
            TensorFile(tmp_path / "x")


def test_what_is_no_file_is_refused_and_nobody_waits(tmp_path):
    save_file({"a": torch.ones(5)}, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    kinds = {"link": "a symbolic link", "folder": "a folder", "pipe": "a pipe"}
    for name, kind in kinds.items():
        with pytest.raises(StateError, match=f"{name} is {kind}; expected a regular file"):
            TensorFile(tmp_path / name)
    with pytest.raises(StateError, match="/dev/zero is a device"):
        TensorFile("/dev/zero")
    with pytest.raises(StateError, match="is not a valid file name"):
        TensorFile("a\0b")
    with pytest.raises(StateError, match="File name too long"):
        TensorFile("a" * 5000)


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 108 characters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(StateError, match="socket is a socket"):
            TensorFile("socket")


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    save_file({"a": torch.ones(5000)}, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", 1000)
        with pytest.raises(StateError, match="has become shorter while it was read, within 'a'"):
            file.read("a")


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by something JSON likes."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 6)):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at:at] = draw.randbytes(draw.randrange(12))
        elif kind == 2:
            del data[at : at + draw.randrange(20)]
        elif kind == 3:
            data[at:at] = data[at : at + draw.randrange(60)]
        elif kind == 4:
            data[at : at + 1] = draw.choice([b"9" * 30, b"-", b"{", b"]", b'"', b"1e400", b"null", b"\0"])
        else:
            data[:8] = draw.choice([0, 1, len(data), 1 << 33, draw.getrandbits(64)]).to_bytes(8, "little")
    return bytes(data)


@pytest.mark.parametrize("batch", range(5))
def test_mutated_files_are_refused_or_read_in_memory_of_their_size(tmp_path, batch):
    save_file({"a": torch.ones(5), "b": torch.ones(2, 3).half()}, tmp_path / "x", metadata={"k": "v"})
    whole = (tmp_path / "x").read_bytes()
    for case in range(100):
        draw = random.Random(1000 * batch + case)
        raw = mutated(whole, draw) if case % 5 else draw.randbytes(draw.randrange(300))
        (tmp_path / "x").write_bytes(raw)
        tracemalloc.start()
        try:
            with TensorFile(tmp_path / "x") as file:
                numel = sum(file.read(name).nbytes for name in file.specs)
            assert numel <= len(raw)
        except StateError:
            pass
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 100 * len(raw)
        tracemalloc.stop()
