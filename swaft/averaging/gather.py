"""Weights that live in shards, whole on rank 0, and back: sent in bounded pieces, kept where they fit."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from swaft.averaging.engines import Engine
from swaft.averaging.engines.base import PIECE
from swaft.averaging.layout import Fragment

IN_MEMORY_BYTES = 1 << 30
"""What whole weights may take of rank 0's memory; larger ones lie in a file that only this process sees."""


class Scratch:
    """Room for host tensors that are whole: memory, or pages of a nameless file, which the system may write out.

    Each tensor has a storage of its own, as safetensors wants it.

    Args:
        folder: on whose disk the file is; it exists where one is needed.
        num_bytes: of all tensors together.
    """

    def __init__(self, folder: Path | None, num_bytes: int):
        self._file = None
        if folder is not None and num_bytes > IN_MEMORY_BYTES:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as the tensors)
        self._end = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor, whatever torch's defaults are."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._file is None or num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        # On a full disk this is an error now, and no signal later.
        os.posix_fallocate(self._file.fileno(), self._end, num_bytes)
        pages = mmap.mmap(self._file.fileno(), num_bytes, offset=self._end)
        grain = mmap.ALLOCATIONGRANULARITY
        self._end += -(-num_bytes // grain) * grain
        return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def gather_trained(engine: Engine, shard: Tensor, *, scratch: Scratch | None = None) -> dict[str, Tensor]:
    """Every trained parameter whole on rank 0's host, from shards (collective; {} elsewhere).

    Args:
        engine: whose layout.
        shard: (engine.numel,), fp32, host: this rank's elements.
        scratch: where the whole tensors are; None: in memory.

    Returns:
        name to (parameter shape), fp32.
    """
    ranks = engine.ranks
    everyone = engine.fragments_by_rank()
    weights: dict[str, Tensor] = {}
    with ranks.together("there is no room for the whole weights on rank 0"):
        if ranks.is_main:
            room = scratch or Scratch(None, 0)
            weights = {name: room.empty(engine.full_shape(each)) for name, each in engine.trainable.items()}
    if not ranks.is_main:
        for piece in shard.split(PIECE):
            ranks.send(piece, to=0)
        return {}
    flat = {name: weight.view(-1) for name, weight in weights.items()}
    message = torch.empty(min(PIECE, _most(everyone[1:])), dtype=torch.float32, device="cpu")
    for rank, fragments in enumerate(everyone):
        for first, last in _pieces(fragments):
            piece = shard[first:last] if rank == 0 else message[: last - first]
            if rank:
                ranks.receive(piece, source=rank)
            for fragment, start, end, offset in _overlaps(fragments, first, last):
                flat[fragment.name][start:end] = piece[offset : offset + end - start]
    return weights


def scatter_trained(engine: Engine, weights: dict[str, Tensor]) -> Tensor:
    """This rank's shard of tensors that are whole on rank 0: :func:`gather_trained` backwards (collective).

    Args:
        engine: whose layout.
        weights: name to (parameter shape), fp32, host, on rank 0; not looked at elsewhere.

    Returns:
        (engine.numel,), fp32, host.
    """
    ranks = engine.ranks
    everyone = engine.fragments_by_rank()
    mine = torch.empty(engine.numel, dtype=torch.float32, device="cpu")
    if not ranks.is_main:
        for piece in mine.split(PIECE):
            ranks.receive(piece, source=0)
        return mine
    for rank, fragments in enumerate(everyone):
        for first, last in _pieces(fragments):
            piece = (
                mine[first:last]
                if rank == 0
                else torch.empty(last - first, dtype=torch.float32, device="cpu")
            )
            for fragment, start, end, offset in _overlaps(fragments, first, last):
                piece[offset : offset + end - start] = weights[fragment.name].reshape(-1)[start:end]
            if rank:
                ranks.send(piece, to=rank)
    return mine


def _numel(fragments: Sequence[Fragment]) -> int:
    return sum(fragment.numel for fragment in fragments)


def _most(everyone: Sequence[Sequence[Fragment]]) -> int:
    return max(map(_numel, everyone), default=0)


def _pieces(fragments: Sequence[Fragment]) -> Iterator[tuple[int, int]]:
    """The messages of a shard: first element, and one past the last. As ``shard.split`` cuts, an empty one too."""
    numel = _numel(fragments)
    for first in range(0, max(numel, 1), PIECE):
        yield first, min(first + PIECE, numel)


def _overlaps(
    fragments: Sequence[Fragment], first: int, last: int
) -> Iterator[tuple[Fragment, int, int, int]]:
    """What a piece holds of each fragment: its elements [start, end), and where they lie in the piece."""
    position = 0
    for fragment in fragments:
        begin, end = max(first, position), min(last, position + fragment.numel)
        if begin < end:
            start = fragment.start + begin - position
            yield fragment, start, start + end - begin, begin - first
        position += fragment.numel
