"""The header of a file of tensors: the safetensors format, written and believed. Pure.

    8 bytes            length of the header, little-endian
    header             JSON, padded with spaces to a multiple of 8 bytes:
                       {"__metadata__": {text: text},
                        NAME: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    buffer             the tensors' bytes, without holes, in the order of their offsets

A header is believed only when all of it agrees with itself and with the size of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swaft.errors import StateError
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

CODES = {dtype: code for code, dtype in DTYPES.items()}

HEADER_LIMIT = 100_000_000
"""Most bytes of a header, as in the safetensors library."""

METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    numel: int
    start: int
    """First byte, in the buffer."""


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, int]:
    """The head of a file, its length included, and how many bytes of tensors must follow.

    Args:
        tensors: name to (dtype, shape), in the order of the buffer.
        metadata: text to text.

    Raises:
        ValueError: a dtype that the format lacks.
    """
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        if name == METADATA:
            raise ValueError(f"a tensor cannot be called {METADATA}")
        if dtype not in CODES:
            raise ValueError(f"{name!r} is {dtype}, which a file of tensors cannot hold")
        end = position + _numel(shape) * dtype.itemsize
        content[name] = {"dtype": CODES[dtype], "shape": [*shape], "data_offsets": [position, end]}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"the header would have {len(text):,} bytes; expected at most {HEADER_LIMIT:,}")
    return len(text).to_bytes(8, "little") + text, position


def check_length(head: bytes, size: int, where: str) -> int:
    """Length of a header, from the first 8 bytes of a file of `size` bytes.

    Raises:
        StateError: the file cannot hold it.
    """
    if len(head) < 8:
        raise StateError(f"{where} has {size} bytes; expected 8 or more: a file of tensors that is cut short")
    length = int.from_bytes(head, "little")
    most = min(size - 8, HEADER_LIMIT)
    if length > most:
        raise StateError(
            f"{where}: header length: found {length:,}, expected at most {most:,} in a file of {size:,} bytes"
        )
    return length


def parse_header(raw: bytes, buffer_bytes: int, where: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors by name in the order in which they lie, and the metadata.

    Args:
        raw: the header without its length.
        buffer_bytes: size of the buffer behind it.
        where: the file's name, for messages.

    Raises:
        StateError: any part of it is wrong.
    """
    if not raw.startswith(b"{"):
        raise StateError(f"{where}: the header begins with {raw[:1]!r}; expected '{{'")
    content = parse_object(raw, f"{where}: header")
    metadata = content.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StateError(f"{where}: header: {METADATA}: expected an object of texts")
    spans = [(*_check_entry(where, name, value), name) for name, value in content.items()]
    spans.sort(key=lambda span: span[1:3])
    position, entries = 0, {}
    for entry, start, end, name in spans:
        if start != position:
            raise StateError(
                f"{where}: header: {shown(name)}: data_offsets: begins at byte {start:,}, expected {position:,}, "
                "where the tensor before it ends"
            )
        entries[name], position = entry, end
    if position != buffer_bytes:
        raise StateError(
            f"{where}: the tensors of the header end at byte {position:,} of a buffer of {buffer_bytes:,} bytes"
        )
    return entries, metadata


def _check_entry(file: str, name: str, value: Any) -> tuple[Entry, int, int]:
    """One tensor of a header, and its first and last byte."""
    where = f"{file}: header: {shown(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise StateError(f"{where}: expected an object of dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise StateError(f"{where}: dtype: found {shown(code)}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(each) for each in shape):
        raise StateError(f"{where}: shape: found {shown(shape)}, expected a list of whole numbers from 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(each) for each in offsets):
        raise StateError(f"{where}: data_offsets: found {shown(offsets)}, expected two whole numbers from 0")
    start, end = offsets
    numel = _numel(shape)
    if numel * dtype.itemsize != end - start or numel >= 1 << 63:
        raise StateError(
            f"{where}: data_offsets: {end - start:,} bytes, expected the {numel * dtype.itemsize:,} of {code} of "
            f"shape {shown(shape)}"
        )
    return Entry(dtype, tuple(shape), numel, start), start, end


def _numel(shape: Sequence[int]) -> int:
    """Elements of a shape, or some number above 2**63 if any part of the product is: no number of a megabyte."""
    numel = 1
    for size in shape:
        numel *= size
        if numel >= 1 << 63:
            break
    return numel


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
