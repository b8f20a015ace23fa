"""Ways to damage a checkpoint, one at a time and undone after it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HEADER_BYTES = 64
"""At the beginning of a file, where most formats say what follows."""
TEXT = ("manifest.json", "COMPLETE")


@dataclass(frozen=True)
class Damage:
    """What files hold after it."""

    name: str
    """In words."""
    files: Mapping[Path, bytes | None]
    """New content by path; None: the file is gone."""
    named: frozenset[Path] = field(default_factory=frozenset)
    """The files or folders, one of which an error has to name; none: those that are damaged."""

    @property
    def culprits(self) -> frozenset[Path]:
        """What an error has to name, one of these."""
        return self.named or frozenset(self.files)

    @contextmanager
    def done(self) -> Iterator[None]:
        """Do it for the time of a context."""
        before = {path: path.read_bytes() if path.exists() else None for path in self.files}
        try:
            write(self.files)
            yield
        finally:
            write(before)


def write(files: Mapping[Path, bytes | None]) -> None:
    """Give files these contents, None: none."""
    for path, content in files.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)


def all_files(checkpoint: Path) -> list[Path]:
    """Every file of a checkpoint."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def damages(checkpoint: Path, other: Path, *, flips: int, seed: int) -> Iterator[Damage]:
    """All the damage that must be noticed.

    Args:
        checkpoint: to be damaged.
        other: an older one of the same run, from which come files that are out of place.
        flips: bits that are flipped in the header of each file, and as many in the rest of it.
        seed: of the bits.
    """
    draw = random.Random(seed)
    for path in all_files(checkpoint):
        yield from _cut_or_flipped(path, flips, draw)
        elsewhere = other / path.relative_to(checkpoint)
        if elsewhere.exists() and elsewhere.read_bytes() != path.read_bytes():
            yield Damage(f"{path.name} of the other checkpoint", {path: elsewhere.read_bytes()})
    yield from _exchanged(checkpoint)
    yield from _other_lists(checkpoint, other)
    yield _of_version(checkpoint, 0)


def newer(checkpoint: Path) -> Iterator[Damage]:
    """Manifests of later versions of the format."""
    version = json.loads((checkpoint / "manifest.json").read_text())["version"]
    yield _of_version(checkpoint, version + 1)
    yield _of_version(checkpoint, version + 98)


def harmless(checkpoint: Path) -> Iterator[Damage]:
    """Files beside those of a checkpoint that mean nothing."""
    for path in all_files(checkpoint):
        yield Damage(f"a stale {path.name}.tmp", {path.with_name(f"{path.name}.tmp"): b"half"})
    for name in ("notes.txt", "rank-00007.safetensors", "engine/.nfs0001", "average/rank-00009.safetensors"):
        yield Damage(f"an unknown {name}", {checkpoint / name: b"unknown"})


def _cut_or_flipped(path: Path, flips: int, draw: random.Random) -> Iterator[Damage]:
    whole = path.read_bytes()
    named = (
        path.parent if path.name == "COMPLETE" else path
    )  # which is then no checkpoint, as far as one can see
    yield Damage(f"{path.name} deleted", {path: None}, named=frozenset([named]))
    lengths = {0, 1, len(whole) // 2, len(whole) - 1} - {len(whole)}
    for length in sorted(each for each in lengths if each >= 0):
        yield Damage(f"{path.name} cut to {length} bytes", {path: whole[:length]})
    bits = 8 * len(whole)
    in_header = min(bits, 8 * HEADER_BYTES)
    for first, last in ((0, in_header), (in_header, bits)):
        for bit in sorted(draw.sample(range(first, last), min(flips, last - first))):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            yield Damage(f"{path.name} with bit {bit} flipped", {path: bytes(flipped)})


def _exchanged(checkpoint: Path) -> Iterator[Damage]:
    """Files of two ranks in each other's place."""
    files = [path for path in all_files(checkpoint) if path.name not in TEXT]
    for i, path in enumerate(files):
        for twin in files[i + 1 :]:
            ranks = path.parent == twin.parent and _without_digits(path) == _without_digits(twin)
            if ranks and path.read_bytes() != twin.read_bytes():
                swapped = {path: twin.read_bytes(), twin: path.read_bytes()}
                yield Damage(f"{path.name} and {twin.name} exchanged", swapped)


def _other_lists(checkpoint: Path, other: Path) -> Iterator[Damage]:
    """Manifest and mark of the other checkpoint: they fit each other, and no file."""
    for folder in [path.parent for path in all_files(checkpoint) if path.name == "COMPLETE"]:
        origin = other / folder.relative_to(checkpoint)
        both = {folder / name: (origin / name).read_bytes() for name in TEXT}
        held = frozenset(path for path in all_files(checkpoint) if path.name != "COMPLETE")
        yield Damage(f"{folder.name}/: manifest and mark of the other checkpoint", both, named=held)


def _of_version(checkpoint: Path, version: int) -> Damage:
    """A manifest of another version of the format, with the mark that fits."""
    content = json.loads((checkpoint / "manifest.json").read_text())
    raw = json.dumps(content | {"version": version}).encode()
    mark = f"{hashlib.sha256(raw).hexdigest()}\n".encode()
    changed = {checkpoint / "manifest.json": raw, checkpoint / "COMPLETE": mark}
    return Damage(f"manifest of version {version}", changed, named=frozenset([checkpoint / "manifest.json"]))


def _without_digits(path: Path) -> str:
    return "".join(each for each in path.name if not each.isdigit())
