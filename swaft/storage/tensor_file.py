"""Files of tensors in the safetensors format, for cases that the library's own calls do not cover.

The library's writer needs every tensor in memory at once. Its reader maps files, and a file that is truncated while
being read kills the process. So both stream here, using the memory of a slice. The library checks the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swaft.errors import ConfigError, StateError
from swaft.storage.files import FileRecord, explained, new_file, open_regular, write_all
from swaft.storage.hashing import BlockHasher
from swaft.storage.strict_json import shown

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
WRITTEN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that weights can be written in, by the names that users pass."""


def dtype_of_weights(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype that weights are to be written in, from ``"bfloat16"`` or ``torch.bfloat16``.

    Raises:
        ConfigError: it is not one of WRITTEN.
    """
    found = WRITTEN.get(name_of(dtype))
    if found is None:
        raise ConfigError(
            f"dtype is {dtype!r}, expected one of {', '.join(WRITTEN)}, or the torch dtype of that name"
        )
    return found


def name_of(dtype: str | torch.dtype) -> str:
    """The name that a dtype has in configurations: ``"bfloat16"``, also for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Spec:
    """The dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """The spec of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize


def write_tensors(
    path: str | PathLike[str],
    specs: Mapping[str, Spec],
    values: Callable[[str], Iterable[Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Write a file of tensors front to back, hashing as it goes, in the way of `new_file`.

    Tensors are ordered by decreasing element size, as in the safetensors library, so that each starts at a multiple
    of its element size; otherwise they keep their order.

    Args:
        path: of a file that does not exist yet, in an existing folder.
        specs: of the tensors, by name.
        values: returns the elements of a tensor, in order, as contiguous host tensors of any size. Each is written
            before the next is requested.
        metadata: text to text, for the header.

    Raises:
        StateError: the name is taken; the file could not be written (disk full, read-only, quota), with the
            system's error as the cause; or the number of values does not match the specs.
        ValueError: the format does not support a dtype.
    """
    specs = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
    header, announced = _make_header(specs, metadata or {})
    written = -len(header)
    with new_file(path) as descriptor, BlockHasher() as hasher:
        for view in chain([memoryview(header)], (_bytes_of(each) for name in specs for each in values(name))):
            written += view.nbytes
            if written > announced:
                break
            while view.nbytes:
                block, view = view[: hasher.room], view[hasher.room :]
                hasher.update(block)
                write_all(descriptor, block)
            hasher.drain()
        if written != announced:
            raise StateError(
                f"{path}: {written:,} bytes of tensors were written; expected the {announced:,} that the header "
                "announces"
            )
        return hasher.record()


class TensorFile:
    """A file of tensors opened for reading in slices; a context manager.

    `specs` maps names to the specs of the tensors, in file order; `metadata` holds the texts of the header.

    Args:
        path: a regular file, not a symbolic link.

    Raises:
        StateError: the file is wrong in any way; names the file and the field of its header.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path, self._file = Path(path), open_regular(path)
        try:
            self.specs, self._starts, self.metadata = _read_header(self._file.fileno(), self.path)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int = 0, end: int | None = None, out: Tensor | None = None) -> Tensor:
        """Elements [start, end) of the flattened tensor.

        Args:
            name: of the tensor.
            start: first element.
            end: one past the last element; None: the end of the tensor.
            out: (end - start,), contiguous, in host memory, of the tensor's dtype: where to put the elements.

        Returns:
            (end - start,): `out`, or a new tensor.

        Raises:
            StateError: the tensor does not have these elements, or the file could not be read.
            ValueError: `out` does not fit.
        """
        if name not in self.specs:
            raise StateError(f"{self.path} has no tensor {name!r}")
        entry = self.specs[name]
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
        position = self._starts[name] + start * entry.dtype.itemsize
        with explained(self.path, "read"):
            while view.nbytes:
                count = os.preadv(self._file.fileno(), [view], position)
                if not count:
                    raise StateError(f"{self.path} has become shorter while it was read, within {name!r}")
                view, position = view[count:], position + count
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _make_header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The header of a file, including its length, and the number of bytes of tensors that must follow."""
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    codes, position = {dtype: code for code, dtype in DTYPES.items()}, 0
    for name, spec in specs.items():
        if name == METADATA:
            raise ValueError(f"a tensor cannot be called {METADATA}")
        if spec.dtype not in codes:
            raise ValueError(f"{name!r} is {spec.dtype}, which a file of tensors cannot hold")
        end = position + spec.nbytes
        content[name] = {"dtype": codes[spec.dtype], "shape": [*spec.shape], "data_offsets": [position, end]}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, position


def _read_header(descriptor: int, path: Path) -> tuple[dict[str, Spec], dict[str, int], dict[str, str]]:
    """The specs of the tensors by name, in file order, the offset of each in the file, and the metadata.

    The library checks the header for consistency and against the size of the file.
    """
    specs, starts = dict[str, Spec](), dict[str, int]()
    try:
        with explained(path, "read"), safe_open(f"/proc/self/fd/{descriptor}", "numpy") as header:
            position = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")
            for name in header.offset_keys():  # without gaps
                found = header.get_slice(name)
                code, shape = found.get_dtype(), tuple(found.get_shape())
                if code not in DTYPES:
                    raise StateError(
                        f"{path}: header: {shown(name)}: dtype: found {shown(code)}, expected one of "
                        f"{', '.join(DTYPES)}"
                    )
                specs[name], starts[name] = Spec(DTYPES[code], shape), position
                position += specs[name].nbytes
            metadata = header.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise StateError(f"{path} is not a complete safetensors file: {str(error)[:300]}") from error
    # The library orders tensors without elements at random.
    in_order = sorted(specs, key=lambda name: (starts[name], specs[name].nbytes, name))
    return {name: specs[name] for name in in_order}, starts, metadata


def _bytes_of(data: Tensor) -> memoryview:
    """A contiguous host tensor as bytes, without copying."""
    if data.device.type != "cpu" or not data.is_contiguous():
        raise ValueError(f"data on {data.device}, contiguous: {data.is_contiguous()}; expected host memory")
    view = data.detach().reshape(-1).view(torch.uint8).numpy().data
    return view.cast("B") if view.nbytes else memoryview(b"")
