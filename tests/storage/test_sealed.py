from __future__ import annotations

import os
import shutil

import pytest
from sealed_folders import edit_manifest, make_folder, make_inner, remark

from swaft.errors import StateError
from swaft.storage import (
    Manifest,
    hash_file,
    is_complete,
    read_manifest,
    remove_sealed,
    seal,
    verify,
    write_durably,
)
from swaft.storage import files as files_module

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

SHA = "0" * 64


def test_what_was_sealed_is_read_and_verified(tmp_path):
    manifest = make_folder(tmp_path / "x")
    assert is_complete(tmp_path / "x")
    found = read_manifest(tmp_path / "x", kind="test")
    assert found == manifest
    verify(tmp_path / "x", found)


def test_the_mark_is_the_hash_that_sealing_returns(tmp_path):
    digest = make_inner(tmp_path / "x")
    assert (tmp_path / "x" / "COMPLETE").read_text() == digest + "\n"


def test_a_complete_folder_is_not_sealed_again(tmp_path):
    make_folder(tmp_path / "x")
    before = {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}
    with pytest.raises(StateError, match="complete already; nothing was changed"):
        seal(tmp_path / "x", Manifest("test", {}, {}))
    assert before == {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}


def test_sealing_refuses_a_file_that_is_not_there_or_of_another_size(tmp_path):
    write_durably(tmp_path / "a", b"abc")
    record = hash_file(tmp_path / "a")
    with pytest.raises(StateError, match="b is missing"):
        seal(tmp_path, Manifest("test", {"a": record, "b": record}, {}))
    (tmp_path / "a").write_bytes(b"abcd")
    with pytest.raises(StateError, match="a has 4 bytes; expected 3"):
        seal(tmp_path, Manifest("test", {"a": record}, {}))
    assert not is_complete(tmp_path)


@pytest.mark.parametrize("content", [{"a": float("nan")}, {"a": object()}])
def test_content_that_json_cannot_hold_seals_nothing(tmp_path, content):
    with pytest.raises((ValueError, TypeError)):
        seal(tmp_path, Manifest("test", {}, content))
    assert not any(tmp_path.iterdir())


def test_names_that_are_not_ascii_are_sealed(tmp_path):
    folder = tmp_path / "gewichte-äß-重み"
    folder.mkdir()
    write_durably(folder / "été 1.bin", b"abc")
    seal(folder, Manifest("test", {"été 1.bin": hash_file(folder / "été 1.bin")}, {}))
    verify(folder, read_manifest(folder, kind="test"))


def test_files_that_are_not_listed_mean_nothing(tmp_path):
    make_folder(tmp_path / "x")
    (tmp_path / "x" / "note.txt.tmp").write_bytes(b"half")
    (tmp_path / "x" / "unknown").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "x" / "pipe")
    verify(tmp_path / "x", read_manifest(tmp_path / "x", kind="test"))


def test_only_the_files_that_are_named_are_verified(tmp_path):
    manifest = make_folder(tmp_path / "x")
    (tmp_path / "x" / "note.txt").write_bytes(b"a tixt\n")
    verify(tmp_path / "x", manifest, names=["rank0.safetensors", "inner"])
    with pytest.raises(StateError, match=r"note.txt is damaged: 7 bytes of SHA-256"):
        verify(tmp_path / "x", manifest, names=["note.txt"])
    with pytest.raises(StateError, match="lists no 'other'"):
        verify(tmp_path / "x", manifest, names=["other"])


def test_a_folder_without_a_mark_is_not_complete(tmp_path):
    make_folder(tmp_path / "x")
    (tmp_path / "x" / "COMPLETE").unlink()
    assert not is_complete(tmp_path / "x")
    with pytest.raises(StateError, match="is not complete: it has no COMPLETE mark"):
        read_manifest(tmp_path / "x", kind="test")


def test_a_folder_that_is_a_link_a_file_or_nothing_is_refused(tmp_path):
    make_folder(tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "file").write_bytes(b"")
    for name, words in {"link": "a symbolic link", "file": "a file"}.items():
        with pytest.raises(StateError, match=f"{name} is {words}; expected a folder"):
            read_manifest(tmp_path / name, kind="test")
        with pytest.raises(StateError, match=f"{name} is {words}; expected a folder"):
            remove_sealed(tmp_path / name)
    with pytest.raises(StateError, match="nothing is missing; expected a folder"):
        read_manifest(tmp_path / "nothing", kind="test")


@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE", "note.txt", "rank0.safetensors"])
def test_a_file_that_is_a_link_or_a_pipe_is_refused_and_nobody_waits(tmp_path, name):
    make_folder(tmp_path / "x")
    path = tmp_path / "x" / name
    shutil.move(path, tmp_path / "real")
    path.symlink_to(tmp_path / "real")
    with pytest.raises(StateError, match=f"{name} is a symbolic link; expected a regular file"):
        read_manifest(tmp_path / "x", kind="test")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StateError, match=f"{name} is a pipe; expected a regular file"):
        read_manifest(tmp_path / "x", kind="test")


def test_a_link_on_the_way_to_a_file_is_refused(tmp_path):
    make_folder(tmp_path / "x")
    shutil.move(tmp_path / "x" / "deep", tmp_path / "elsewhere")
    (tmp_path / "x" / "deep").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="deep is a symbolic link; expected a folder"):
        read_manifest(tmp_path / "x", kind="test")


BAD_PATHS = [
    "/etc/passwd",
    "../outside",
    "deep/../../outside",
    "deep/..",
    "./note.txt",
    "deep//er",
    "note.txt/",
    "",
    "a\\b",
    "a\0b",
    "a\nb",
    "\ud800",
    "manifest.json",
    "COMPLETE",
]


@pytest.mark.parametrize(("where", "bad"), [*(("files", bad) for bad in BAD_PATHS), ("sealed", "../outside")])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, where, bad):
    make_folder(tmp_path / "x")
    (tmp_path / "outside").write_bytes(b"abc")
    value = {"bytes": 3, "sha256": SHA} if where == "files" else SHA
    edit_manifest(tmp_path / "x", **{where: {bad: value}})
    with pytest.raises(StateError, match=rf"manifest.json: {where}: found .*expected a relative path inside"):
        read_manifest(tmp_path / "x", kind="test")


BAD_FIELDS = {
    "of another format": ({"format": "zip"}, "format: found 'zip', expected 'swaft'"),
    "without a version": ({"version": None}, "version: found None"),
    "of version 0": ({"version": 0}, "version: found 0"),
    "of version true": ({"version": True}, "version: found True"),
    "of a newer version": (
        {"version": 2},
        "version: 2, written by a newer swaft; expected at most 1. Upgrade",
    ),
    "of another kind": ({"kind": "other"}, "kind: found 'other', expected 'test'"),
    "of no kind": ({"kind": 3}, "kind: found 3, expected 'test'"),
    "with a field too many": ({"more": 1}, "found the fields"),
    "without content": ({"content": None}, "found the fields"),
    "with a list of files": ({"files": []}, r"files: found \[\], expected an object"),
    "with content that is a text": ({"content": "a"}, "content: found 'a', expected an object"),
    "with a size as text": (
        {"files": {"a": {"bytes": "3", "sha256": SHA}}},
        "'a': bytes: found '3', expected",
    ),
    "with a negative size": ({"files": {"a": {"bytes": -3, "sha256": SHA}}}, "'a': bytes: found -3"),
    "with a size of 80 bits": ({"files": {"a": {"bytes": 1 << 80, "sha256": SHA}}}, "'a': bytes: found 1208"),
    "with a broken size": ({"files": {"a": {"bytes": 3.0, "sha256": SHA}}}, "'a': bytes: found 3.0"),
    "with a short digest": (
        {"files": {"a": {"bytes": 3, "sha256": "0"}}},
        "'a': sha256: found '0', expected 64",
    ),
    "with a digest and a newline": (
        {"files": {"a": {"bytes": 3, "sha256": SHA + "\n"}}},
        "'a': sha256: found",
    ),
    "with a record that is a number": (
        {"files": {"a": 3}},
        "'a': found 3, expected an object of bytes and sha256",
    ),
    "with a digest that is a number": ({"sealed": {"inner": 3}}, "'inner': found 3, expected 64"),
    "with a name that is two things": ({"sealed": {"note.txt": SHA}}, "both files and sealed folders"),
    "with a file that is missing": ({"files": {"a": {"bytes": 3, "sha256": SHA}}}, "x/a is missing"),
    "with a path through a file": (
        {"files": {"note.txt/a": {"bytes": 3, "sha256": SHA}}},
        "note.txt is a file",
    ),
    "with a name of 5,000 letters": (
        {"files": {"a" * 5000: {"bytes": 3, "sha256": SHA}}},
        "File name too long",
    ),
    "with a folder among the files": (
        {"files": {"deep": {"bytes": 3, "sha256": SHA}}},
        "deep is a folder; exp",
    ),
    "with a file among the sealed": (
        {"files": {}, "sealed": {"note.txt": SHA}},
        "note.txt is a file; expected a f",
    ),
    "with another inner manifest": ({"sealed": {"inner": SHA}}, f"lists: its SHA-256 is .*, expected {SHA}"),
    "claiming 10 GB": (
        {"files": {"note.txt": {"bytes": 10**10, "sha256": SHA}}},
        "has 7 bytes; expected 10,000",
    ),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_manifest_is_refused_and_the_field_named(tmp_path, name):
    fields, message = BAD_FIELDS[name]
    make_folder(tmp_path / "x")
    edit_manifest(tmp_path / "x", **fields)
    with pytest.raises(StateError, match=message):
        read_manifest(tmp_path / "x", kind="test")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "found a list, expected an object"),
        (b"\xff", "not valid JSON"),
        (b'{"format": "swaft", "format": "swaft"}', "the key 'format' is there twice"),
        (b'{"format":' + b"[" * 200_000, "nested too deep"),
        (b'{"format": Infinity}', "found Infinity"),
    ],
)
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path, raw, message):
    make_folder(tmp_path / "x")
    remark(tmp_path / "x", raw)
    with pytest.raises(StateError, match=f"manifest.json: {message}"):
        read_manifest(tmp_path / "x", kind="test")


def test_a_manifest_of_10_gb_is_not_read(tmp_path):
    make_folder(tmp_path / "x")
    os.truncate(tmp_path / "x" / "manifest.json", 10**10)
    with pytest.raises(StateError, match="10,000,000,000 bytes; expected at most 256,000,000"):
        read_manifest(tmp_path / "x", kind="test")


def test_damage_inside_a_sealed_folder_inside_is_found(tmp_path):
    manifest = make_folder(tmp_path / "x")
    (tmp_path / "x" / "inner" / "note.txt").write_bytes(b"insyde")
    with pytest.raises(StateError, match=r"inner/note.txt is damaged"):
        verify(tmp_path / "x", manifest)
    (tmp_path / "x" / "inner" / "COMPLETE").unlink()
    with pytest.raises(StateError, match="inner is not complete"):
        read_manifest(tmp_path / "x", kind="test")


def test_removing_takes_the_mark_first(tmp_path, monkeypatch):
    make_folder(tmp_path / "x")

    def crash(folder):
        assert not is_complete(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        remove_sealed(tmp_path / "x")
    monkeypatch.undo()
    assert (tmp_path / "x" / "manifest.json").exists()
    assert not is_complete(tmp_path / "x")
    remove_sealed(tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_durably(tmp_path / "a", b"old")
    for call in ("write", "fsync", "replace"):

        def fail(*arguments):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(files_module.os, call, fail)
        with pytest.raises(StateError, match="a could not be written: Input/output error"):
            write_durably(tmp_path / "a", b"new")
        monkeypatch.undo()
        assert [file.name for file in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_bytes() == b"old"
    write_durably(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
