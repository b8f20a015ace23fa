"""Checkpoints of a run without DeepSpeed, read in slices: torch's own loader loads the whole model into memory.

They come from one process, DDP or FSDP2, on any number of ranks.

The files are those of torch's distributed checkpoints. `.metadata` is Python pickle, and opening it runs whatever
code it contains. It says which rows of each tensor are stored where, in chunks; each chunk is a whole `torch.save`
inside a larger file. Torch also opens the chunks, but only to find where in the file the numbers are. They are
copied from there through mapped files, so only a slice is ever in memory.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights
from swaft.storage import Spec
from swaft.storage.files import require_regular

if TYPE_CHECKING:  # it takes seconds and 46 MiB, which other checkpoints do not need
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

METADATA = ".metadata"
MODEL = "model."
"""The prefix of the names of weights."""
OPTIMIZER = "optimizer.state."
"""The prefix of the names of optimizer state; the name of the weight follows, then that of the state."""
MAPPED = 16
"""Files mapped at a time for each checkpoint, which has one per rank: each keeps a descriptor open."""

Mapped = Callable[[Path], Tensor]
"""The bytes of a file, mapped."""


class Chunk(NamedTuple):
    """Where some rows of a tensor are stored: (*shape of the rows, bytes per element), as a view of a file's bytes.

    They are viewed as bytes because the numbers in the file are not aligned.
    """

    file: Path
    begin: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.shape[:-1])

    def of(self, mapped: Mapped) -> Tensor:
        """The view, uint8."""
        return mapped(self.file).as_strided(self.shape, self.strides, self.begin)


def open_torch_engine(path: Path) -> SavedWeights:
    """Open the folder `engine` in a checkpoint of a run without DeepSpeed. This unpickles one of its files.

    Tied weights are stored under each of their names, without saying which names are tied. The optimizer has state
    for only one of these names, so the others are among the names without optimizer state.

    Args:
        path: the folder; its files have been checked.

    Raises:
        StateError: they could not be read.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    mapped = lru_cache(MAPPED)(_map)
    try:
        metadata = FileSystemReader(path).read_metadata()
        stored = {
            key.removeprefix(MODEL): found
            for key, found in metadata.state_dict_metadata.items()
            if key.startswith(MODEL) and isinstance(found, TensorStorageMetadata)
        }
        chunks = {name: _chunks(path, metadata, name, found, mapped) for name, found in stored.items()}
    except Exception as error:  # whatever unpickling meets
        raise StateError(f"{path} could not be read: {type(error).__name__}: {error}") from error
    if not stored:
        raise StateError(f"{path} holds no weights; expected names that begin with {MODEL!r}")
    optimized = {
        key.removeprefix(OPTIMIZER).rpartition(".")[0]
        for key in metadata.state_dict_metadata
        if key.startswith(OPTIMIZER)
    }
    specs = {name: Spec(found.properties.dtype, tuple(found.size)) for name, found in stored.items()}

    def close() -> None:
        chunks.clear()
        mapped.cache_clear()

    return SavedWeights(
        path=path,
        specs=specs,
        read=lambda name, start, end: _read(chunks[name], mapped, specs[name].dtype, start, end),
        close=close,
        label=str(path),
        maybe_tied=specs.keys() - optimized,
    )


def _read(chunks: list[Chunk], mapped: Mapped, dtype: torch.dtype, start: int, end: int) -> Tensor:
    """Copy elements [start, end) of a flattened tensor from its chunks."""
    parts, begin = [torch.empty(0, dtype.itemsize, dtype=torch.uint8)], 0
    for chunk in chunks:
        first, last = max(start - begin, 0), min(end - begin, chunk.numel)
        begin += chunk.numel
        if first >= last:
            continue
        view = chunk.of(mapped)
        if view.is_contiguous():
            parts.append(view.view(-1, dtype.itemsize)[first:last])
        else:
            parts.append(view[torch.unravel_index(torch.arange(first, last), view.shape[:-1])])
    return torch.cat(parts).view(dtype).reshape(-1)


def _chunks(
    path: Path, metadata: Metadata, name: str, stored: TensorStorageMetadata, mapped: Mapped
) -> list[Chunk]:
    """The chunks of a tensor, in the order of its elements."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    found, row, key = list[Chunk](), 0, f"{MODEL}{name}"
    for chunk in sorted(stored.chunks, key=lambda each: tuple(each.offsets)):
        if not math.prod(chunk.sizes):  # from a rank without rows of it
            continue
        expected = (row, *[0] * (len(stored.size) - 1))[: len(stored.size)]  # () in a tensor of one number
        if tuple(chunk.offsets) != expected or chunk.sizes[1:] != stored.size[1:]:
            raise ValueError(f"{key!r} is stored in pieces that are not consecutive rows")
        row += chunk.sizes[0] if chunk.sizes else 1
        where: Any = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        found.append(_locate(path / where.relative_path, where, chunk.sizes, mapped))
    if sum(chunk.numel for chunk in found) != math.prod(stored.size):
        raise ValueError(f"{key!r} of shape {list(stored.size)} lacks rows")
    return found


def _locate(file: Path, where: Any, shape: torch.Size, mapped: Mapped) -> Chunk:
    """Find the chunk saved at a position in a file."""
    from torch.distributed.checkpoint.utils import _create_file_view

    with file.open("rb") as stream:
        part: Any = _create_file_view(stream, where.offset, where.length)
        saved: Tensor = torch.load(part, map_location="meta", weights_only=True)
    if saved.shape != shape:
        raise ValueError(f"{file} holds a chunk of shape {list(saved.shape)}; expected {list(shape)}")
    size, strides = saved.itemsize, saved.stride()
    # On the device `meta`, torch reads no numbers, but reports where they begin in its input.
    begin = where.offset + saved.untyped_storage()._checkpoint_offset + int(saved.storage_offset()) * size
    chunk = Chunk(file, begin, (*shape, size), (*(stride * size for stride in strides), 1))
    chunk.of(mapped)  # raises if the file is too short
    return chunk


def _map(file: Path) -> Tensor:
    """Map the bytes of a file, which are read on access.

    The mapping is read-only: torch's own mapping would be writable, so the system would reserve memory for it.
    """
    require_regular(file)
    with file.open("rb") as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ), dtype=torch.uint8)
