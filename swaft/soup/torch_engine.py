"""Checkpoints of a run under torch alone, read in slices: torch's own loader puts the whole model into memory.

They are of one process, DDP or FSDP2, on any number of ranks.

The files are those of torch's distributed checkpoints. `.metadata` is Python pickle, whose opening runs whatever
code is in it, and says of every tensor which rows of it lie where: a chunk each, which is a whole `torch.save`
inside a larger file. Torch opens those too, but only says where in the file the numbers are. They are copied from
there, by way of files that torch maps, so that only a slice is ever in memory.
"""

from __future__ import annotations

import math
import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights, Spec
from swaft.storage.files import require_regular

if TYPE_CHECKING:  # for it takes seconds and 46 MiB, which other checkpoints do without
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

METADATA = ".metadata"
MODEL = "model."
"""How the names of weights begin."""
OPTIMIZER = "optimizer.state."
"""How the names of the optimizer's state begin; the weight's name follows, then that of the state."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of a tensor, somewhere in a file."""

    raw: Tensor
    """Its storage, mapped: (n, bytes of an element), uint8, for in the file numbers lie at any byte."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """Element of the storage that is the chunk's first."""
    contiguous: bool

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def read(self, start: int, end: int) -> Tensor:
        """Copy elements [start, end) of the flattened chunk, as bytes: (end - start, bytes of an element)."""
        if self.contiguous:
            return self.raw[self.offset + start : self.offset + end].clone()
        left = torch.arange(start, end, device="cpu")
        places = torch.full_like(left, self.offset)
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            places += left % size * stride
            left //= size
        return self.raw[places]


class TorchEngineFolder(SavedWeights):
    """Folder `engine` in a checkpoint of a run under torch alone. Opening it unpickles one of its files.

    Tied weights are in it under each of their names, and it does not say which those are. The optimizer has one of
    them, so the others are among the names that it has nothing for.

    Args:
        path: the folder; its files have been checked.

    Raises:
        StateError: they could not be read.
    """

    def __init__(self, path: Path):
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.path = path
        try:
            metadata = FileSystemReader(path).read_metadata()
            self._mapped: dict[str, Tensor] = {}
            self._chunks = {
                key.removeprefix(MODEL): self._chunks_of(metadata, key, stored)
                for key, stored in metadata.state_dict_metadata.items()
                if key.startswith(MODEL) and isinstance(stored, TensorStorageMetadata)
            }
            self.specs = {
                name: _spec(metadata.state_dict_metadata[f"{MODEL}{name}"]) for name in self._chunks
            }
        except Exception as error:  # whatever unpickling meets
            raise StateError(f"{path} could not be read: {type(error).__name__}: {error}") from error
        if not self.specs:
            raise StateError(f"{path} holds no weights; expected names that begin with {MODEL!r}")
        optimized = {
            key.removeprefix(OPTIMIZER).rpartition(".")[0]
            for key in metadata.state_dict_metadata
            if key.startswith(OPTIMIZER)
        }
        self.maybe_tied = self.specs.keys() - optimized

    def read(self, name: str, start: int, end: int) -> Tensor:
        """As of :class:`SavedWeights`."""
        dtype, parts, begin = self.specs[name].dtype, [], 0
        for chunk in self._chunks[name]:
            first, last = max(start - begin, 0), min(end - begin, chunk.numel)
            if first < last:
                parts.append(chunk.read(first, last))
            begin += chunk.numel
        if not parts:
            return torch.empty(0, dtype=dtype, device="cpu")
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(dtype).reshape(-1)

    def close(self) -> None:
        """Let go of the files."""
        self._chunks.clear()
        self._mapped.clear()

    def _chunks_of(self, metadata: Metadata, key: str, stored: TensorStorageMetadata) -> list[StoredRows]:
        """The chunks of a tensor in the order of its elements."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        found, row = list[StoredRows](), 0
        for chunk in sorted(stored.chunks, key=lambda each: tuple(each.offsets)):
            if not math.prod(chunk.sizes):  # of a rank that has no row of it
                continue
            if tuple(chunk.offsets) != (row, *[0] * (len(stored.size) - 1))[: len(stored.size)] or (
                chunk.sizes[1:] != stored.size[1:]
            ):
                raise ValueError(f"{key!r} lies in pieces that are no rows one after the other")
            row += chunk.sizes[0] if chunk.sizes else 1
            found.append(self._locate(metadata.storage_data[MetadataIndex(key, chunk.offsets)], chunk.sizes))
        if sum(chunk.numel for chunk in found) != math.prod(stored.size):
            raise ValueError(f"{key!r} of shape {list(stored.size)} lacks rows")
        return found

    def _locate(self, where: Any, shape: torch.Size) -> StoredRows:
        """The chunk that was saved at a place of a file."""
        from torch.distributed.checkpoint.utils import _create_file_view

        file = self.path / where.relative_path
        mapped = self._mapped.get(where.relative_path)
        if mapped is None:
            mapped = self._mapped[where.relative_path] = _map(file)
        with file.open("rb") as stream:
            part: Any = _create_file_view(stream, where.offset, where.length)
            saved: Tensor = torch.load(part, map_location="meta", weights_only=True)
        if saved.shape != shape:
            raise ValueError(f"{file} holds a chunk of shape {list(saved.shape)}; expected {list(shape)}")
        storage = saved.untyped_storage()
        # On the device `meta`, torch reads no numbers, and says where they begin in what it was given.
        begin = where.offset + storage._checkpoint_offset
        raw = mapped[begin : begin + storage.nbytes()].view(-1, saved.itemsize)
        return StoredRows(
            raw, tuple(saved.shape), saved.stride(), int(saved.storage_offset()), saved.is_contiguous()
        )


def _map(file: Path) -> Tensor:
    """The bytes of a file, read when they are asked for.

    Mapped for reading alone: a mapping that torch makes could be written to, and the system promises memory for it.
    """
    require_regular(file)
    with file.open("rb") as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ), dtype=torch.uint8)


def _spec(stored: Any) -> Spec:
    return Spec(stored.properties.dtype, tuple(stored.size))
