"""Sealed folders that lost, gained or changed a byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tracemalloc

import pytest
from sealed_folders import make_folder, remark

from swaft.errors import StateError
from swaft.storage import read_manifest, verify

pytestmark = pytest.mark.unit


def check(folder, kind="test"):
    verify(folder, read_manifest(folder, kind=kind))


def listed(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_changed_byte_of_every_file_is_noticed(tmp_path):
    make_folder(tmp_path / "x")
    draw, changed = random.Random(0), 0
    for path in listed(tmp_path / "x"):
        whole = path.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= draw.randrange(1, 256)
            path.write_bytes(damaged)
            with pytest.raises(StateError):
                check(tmp_path / "x")
            changed += 1
        path.write_bytes(whole)
    assert changed > 1000
    check(tmp_path / "x")


def test_a_flipped_bit_is_named(tmp_path):
    manifest = make_folder(tmp_path / "x", numel=2_000_000)
    path = tmp_path / "x" / "rank0.safetensors"
    draw, size = random.Random(1), path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        for _ in range(1000):
            position, bit = draw.randrange(size), 1 << draw.randrange(8)
            before = os.pread(file.fileno(), 1, position)
            os.pwrite(file.fileno(), bytes([before[0] ^ bit]), position)
            with pytest.raises(
                StateError, match=r"rank0.safetensors is damaged: .* bytes of SHA-256 .*; expected"
            ):
                verify(tmp_path / "x", manifest, names=["rank0.safetensors"])
            os.pwrite(file.fileno(), before, position)
    check(tmp_path / "x")


def test_every_file_cut_short_or_grown_is_noticed(tmp_path):
    make_folder(tmp_path / "x")
    for path in listed(tmp_path / "x"):
        whole = path.read_bytes()
        for damaged in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\0", whole + whole):
            path.write_bytes(damaged)
            with pytest.raises(StateError):
                check(tmp_path / "x")
        path.write_bytes(whole)
    check(tmp_path / "x")


def test_every_deleted_file_is_noticed(tmp_path):
    make_folder(tmp_path / "x")
    for path in listed(tmp_path / "x"):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(StateError, match=f"{path.name} is missing|has no COMPLETE mark"):
            read_manifest(tmp_path / "x", kind="test")
        path.write_bytes(whole)
    check(tmp_path / "x")


def test_swapped_and_copied_files_are_noticed(tmp_path):
    make_folder(tmp_path / "x")
    make_folder(tmp_path / "y", value=2.0)
    paths = listed(tmp_path / "x")
    contents = [path.read_bytes() for path in paths]
    others = [tmp_path / "y" / path.relative_to(tmp_path / "x") for path in paths]
    for i, path in enumerate(paths):
        for foreign in {*contents[:i], *contents[i + 1 :], others[i].read_bytes()} - {contents[i]}:
            path.write_bytes(foreign)
            with pytest.raises(StateError):
                check(tmp_path / "x")
        path.write_bytes(contents[i])
    check(tmp_path / "x")


def test_a_mark_with_an_older_manifest_is_noticed(tmp_path):
    make_folder(tmp_path / "x")
    make_folder(tmp_path / "older", value=0.5)
    shutil.copy(tmp_path / "older" / "manifest.json", tmp_path / "x" / "manifest.json")
    with pytest.raises(
        StateError, match=r"manifest.json is not the one that .*COMPLETE marks: its SHA-256 is"
    ):
        read_manifest(tmp_path / "x", kind="test")


def hostile(content, draw):
    """A parsed manifest with one value somewhere in it replaced by a strange one."""
    strange = [
        None, True, -1, 0, 1 << 62, 1 << 64, 10**10, 1.5, 1e300, "", "..", "../../etc/passwd", "/etc/passwd",
        "/dev/zero", "a/" * 3000, "\0", "\ud800", [], {}, [[]], {"": ""}, "0" * 64, "x" * 300,
        {"bytes": 1 << 62, "sha256": "0" * 64}, {"/dev/zero": {"bytes": 0, "sha256": "0" * 64}},
    ]  # fmt: skip
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = draw.choice(keys)
        inside = node[key]
        if isinstance(inside, dict | list) and inside and draw.random() < 0.7:
            node = inside
            continue
        action = draw.randrange(3)
        if action == 0:
            node[key] = draw.choice(strange)
        elif action == 1:
            del node[key]
        elif isinstance(node, dict):
            node[str(draw.choice(strange))] = node.pop(key)
        return


@pytest.mark.parametrize("batch", range(5))
def test_made_up_manifests_are_refused_or_true(tmp_path, batch):
    make_folder(tmp_path / "x")
    whole = (tmp_path / "x" / "manifest.json").read_bytes()
    for case in range(100):
        draw = random.Random(1000 * batch + case)
        if case % 3 == 0:
            raw = bytearray(whole)
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(len(raw))
                raw[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
            raw = bytes(raw)
        elif case % 7 == 0:
            raw = draw.randbytes(draw.randrange(500))
        else:
            content = json.loads(whole)
            for _ in range(draw.randint(1, 3)):
                hostile(content, draw)
            raw = json.dumps(content).encode()
        remark(tmp_path / "x", raw)
        tracemalloc.start()
        try:
            manifest = read_manifest(tmp_path / "x", kind="test")
            assert hashlib.sha256(raw).hexdigest() == (tmp_path / "x" / "COMPLETE").read_text().strip()
            assert all(
                (tmp_path / "x" / name).stat().st_size == r.bytes for name, r in manifest.files.items()
            )
        except StateError:
            pass
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 100 * len(raw)
        tracemalloc.stop()
