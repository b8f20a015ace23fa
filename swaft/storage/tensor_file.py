"""Files of tensors in the safetensors format, where the library's own calls fall short.

Its writer wants every tensor in memory at once, and its reader maps files: one that is cut short while it is read
kills the process. So both stream here, in memory of a slice. The header is checked by the library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swaft.errors import StateError
from swaft.storage.files import (
    FileRecord,
    create_temporary,
    explained,
    open_regular,
    status,
    sync_folder,
    write_all,
)
from swaft.storage.hashing import BlockHasher
from swaft.storage.strict_json import parse_object, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes."""
METADATA = "__metadata__"


class TensorFileWriter:
    """Writes a file of tensors front to back, hashing as it goes; a context manager.

    The bytes go to `<path>.tmp`. The name is given once all that was announced has been written and is on the disk;
    leaving the `with` by an exception leaves nothing.

    Args:
        path: of a file that does not exist yet, in a folder that does.
        tensors: name to (dtype, shape), in the order in which the values will come. By falling element size, as
            the safetensors library orders them, every tensor lies at a multiple of its elements' size.
        metadata: text to text, for the header.

    Raises:
        StateError: something has the name, or the file could not be written (disk full, read-only, quota); also by
            every method. The system's error is the cause.
        ValueError: a dtype that the format lacks.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        *,
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self.record: FileRecord
        """What was written; there after :meth:`close`."""
        header, self._announced = _make_header(tensors, metadata or {})
        _refuse_existing(self.path)
        self._descriptor, self._temporary = create_temporary(self.path)
        self._hasher = BlockHasher()
        self._written = -len(header)
        try:
            self.write(memoryview(header))
        except BaseException:
            self.abandon()
            raise

    def write(self, data: Tensor | np.ndarray | memoryview) -> None:
        """Write the next bytes: contiguous values in host memory, of any length, also across tensors.

        On return the data has been hashed and handed to the system, and may change.
        """
        view = _bytes_of(data)
        self._written += view.nbytes
        self._require(self._written <= self._announced)
        with explained(self.path, "written"):
            while view.nbytes:
                block, view = view[: self._hasher.room], view[self._hasher.room :]
                self._hasher.update(block)
                write_all(self._descriptor, block)
        self._hasher.drain()

    def close(self) -> None:
        """Bring the file to the disk and give it its name; sets `record`."""
        if self._descriptor < 0:
            return
        try:
            self._require(self._written == self._announced)
            record = self._hasher.record()
            with explained(self.path, "written"):
                os.fsync(self._descriptor)
            _refuse_existing(self.path)
            with explained(self.path, "written"):
                os.rename(self._temporary, self.path)
        except BaseException:
            self.abandon()
            raise
        self._release()
        sync_folder(self.path.parent)
        self.record = record

    def abandon(self) -> None:
        """Leave nothing behind; nothing to do after :meth:`close`."""
        if self._descriptor < 0:
            return
        self._release()
        with suppress(OSError):
            os.unlink(self._temporary)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _require(self, announced: bool) -> None:
        if not announced:
            raise StateError(
                f"{self.path}: {self._written:,} bytes of tensors were written; expected the {self._announced:,} "
                "that the header announces"
            )

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        self._hasher.close()
        with suppress(OSError):  # everything that matters is on the disk already
            os.close(descriptor)


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, in the file."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


class TensorFile:
    """A file of tensors opened for reading in slices; a context manager.

    Args:
        path: a regular file, no symbolic link.

    Raises:
        StateError: whatever is wrong with the file, naming the file and the field of its header.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        self._descriptor, _ = open_regular(path)
        try:
            self._entries, self.metadata = _read_header(self._descriptor, self.path)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which they lie."""
        return tuple(self._entries)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entry(name).shape

    def numel(self, name: str) -> int:
        """A tensor's number of elements."""
        return self._entry(name).numel

    def read(self, name: str, start: int = 0, end: int | None = None, out: Tensor | None = None) -> Tensor:
        """Elements [start, end) of the flattened tensor.

        Args:
            name: of the tensor.
            start: first element.
            end: one past the last; None: to the tensor's end.
            out: (end - start,), contiguous, host memory, of the tensor's dtype: where to put them.

        Returns:
            (end - start,): `out`, or a new tensor.

        Raises:
            StateError: the tensor has no such elements, or the file could not be read.
            ValueError: `out` does not fit.
        """
        entry = self._entry(name)
        end = entry.numel if end is None else end
        if not 0 <= start <= end <= entry.numel:
            raise StateError(
                f"{self.path}: elements {start}..{end} of {name!r} were asked for, which has {entry.numel:,}"
            )
        if out is None:
            out = torch.empty(end - start, dtype=entry.dtype, device="cpu")
        elif out.dtype != entry.dtype or out.shape != (end - start,):
            raise ValueError(
                f"out is {out.dtype} of shape {tuple(out.shape)}; expected {entry.dtype} of ({end - start},)"
            )
        view = _bytes_of(out)
        position = entry.start + start * entry.dtype.itemsize
        with explained(self.path, "read"):
            while view.nbytes:
                count = os.preadv(self._descriptor, [view], position)
                if not count:
                    raise StateError(f"{self.path} has become shorter while it was read, within {name!r}")
                view, position = view[count:], position + count
        return out

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise StateError(f"{self.path} has no tensor {name!r}")
        return self._entries[name]


def _make_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """The head of a file, its length included, and how many bytes of tensors must follow."""
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    codes, position = {dtype: code for code, dtype in DTYPES.items()}, 0
    for name, (dtype, shape) in tensors.items():
        if name == METADATA:
            raise ValueError(f"a tensor cannot be called {METADATA}")
        if dtype not in codes:
            raise ValueError(f"{name!r} is {dtype}, which a file of tensors cannot hold")
        end = position + prod(shape) * dtype.itemsize
        content[name] = {"dtype": codes[dtype], "shape": [*shape], "data_offsets": [position, end]}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, position


def _read_header(descriptor: int, path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Tensors by name in the order in which they lie, and the metadata.

    The library has held the header to itself and to the size of the file before any of it is believed; what it lets
    pass is refused here: a key twice, fields that nobody knows.
    """
    try:
        with explained(path, "read"), safe_open(f"/proc/self/fd/{descriptor}", "numpy"):
            pass
    except (SafetensorError, ValueError) as error:
        raise StateError(f"{path} is no whole file of tensors: {str(error)[:300]}") from error
    with explained(path, "read"), open(descriptor, "rb", closefd=False) as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        raw = file.read(begin - 8)
    content = parse_object(raw, f"{path}: header")
    metadata, entries = content.pop(METADATA, {}), dict[str, _Entry]()
    if metadata is None:
        raise StateError(f"{path}: header: {METADATA}: expected an object of texts")
    for name, found in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        if found.keys() > {"dtype", "shape", "data_offsets"}:
            raise StateError(
                f"{path}: header: {shown(name)}: expected an object of dtype, shape and data_offsets"
            )
        if found["dtype"] not in DTYPES:
            raise StateError(
                f"{path}: header: {shown(name)}: dtype: found {shown(found['dtype'])}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        entries[name] = _Entry(
            DTYPES[found["dtype"]], tuple(found["shape"]), begin + found["data_offsets"][0]
        )
    return entries, metadata


def _refuse_existing(path: Path) -> None:
    if status(path) is not None:
        raise StateError(f"{path} exists already; nothing was changed there. Name another, or delete it")


def _bytes_of(data: Tensor | np.ndarray | memoryview | bytes) -> memoryview:
    """Contiguous data in host memory as bytes, not copied."""
    if isinstance(data, Tensor):
        if data.device.type != "cpu" or not data.is_contiguous():
            raise ValueError(
                f"data on {data.device}, contiguous: {data.is_contiguous()}; expected host memory"
            )
        data = data.detach().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("the array is not contiguous")
        data = data.reshape(-1).view(np.uint8).data
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")
