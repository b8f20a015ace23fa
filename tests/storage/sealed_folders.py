"""A small sealed folder with a file of every kind, for the tests of damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from unittest import mock

import torch

from swaft.storage import Manifest, Spec, hash_file, seal, write_durably, write_tensors


def make_inner(folder: Path) -> str:
    """A sealed folder to lie in another one; returns the hash of its manifest."""
    folder.mkdir()
    write_durably(folder / "note.txt", b"inside")
    return seal(folder, Manifest("inner", {"note.txt": hash_file(folder / "note.txt")}, {}))


def make_folder(folder: Path, *, numel: int = 10, value: float = 1.0) -> Manifest:
    """Seal a folder with two files of tensors, one of them deeper, a text, and a sealed folder inside."""
    (folder / "deep" / "er").mkdir(parents=True)
    files = {}
    for name, size in {"rank0.safetensors": numel, "deep/er/rank1.safetensors": 3}.items():
        values = torch.full([size], value)
        files[name] = write_tensors(folder / name, {"w": Spec.of(values)}, lambda _, all=values: [all])
    write_durably(folder / "note.txt", b"a text\n")
    files["note.txt"] = hash_file(folder / "note.txt")
    sealed = {"inner": make_inner(folder / "inner")}
    manifest = Manifest("test", files, {"step": 7, "names": ["ä", None]}, sealed)
    seal(folder, manifest)
    return manifest


def remark(folder: Path, raw: bytes) -> None:
    """Give a folder another manifest and the mark that fits it, as somebody who means harm would."""
    (folder / "manifest.json").write_bytes(raw)
    (folder / "COMPLETE").write_text(hashlib.sha256(raw).hexdigest() + "\n")


class Crash(BaseException):
    """The process ends here."""


FAULTS = {"crash": Crash(), "no space": OSError(28, "No space left on device")}


@contextmanager
def failing(fault: BaseException, survived: int, *names: str) -> Iterator[None]:
    """Inside, functions of these names raise a fault once so many of their calls have been survived."""
    left = survived

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal left
            left -= 1
            if left < 0:
                raise fault
            return function(*arguments, **keywords)

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(name, counted(resolve_name(name))))
        yield


def edit_manifest(folder: Path, **fields) -> None:
    """Set fields of a manifest (None: take them out), and mark it."""
    content = json.loads((folder / "manifest.json").read_text()) | fields
    remark(folder, json.dumps({k: v for k, v in content.items() if v is not None}).encode())
