"""What is made from a rank's shard: a blend with the last weights, and whole tensors on rank 0.

The last weight and the average of an element lie on the same rank, so a blend needs no communication, and its bits
are the same under every engine and any number of ranks. Whole tensors are sent in bounded pieces, and kept where
they fit.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swaft.averaging.adapters import is_peft
from swaft.averaging.engines import Engine
from swaft.averaging.engines.base import PIECE
from swaft.averaging.layout import Fragment, section
from swaft.averaging.rules import Readout
from swaft.errors import AveragingError

IN_MEMORY_BYTES = 1 << 30
"""How much of rank 0's memory whole weights may take; beyond that, they go to a file only this process sees."""


class Scratch:
    """Room for whole host tensors: memory, or pages of one unnamed file, which the system may write out.

    Each tensor has its own storage, as safetensors requires. What goes beyond the announced bytes is in memory.

    Args:
        folder: the file is created on this folder's disk; the folder is created if needed. None: memory only.
        num_bytes: of all tensors together.
    """

    def __init__(self, folder: Path | None, num_bytes: int):
        self._pages, self._end = None, 0
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if num_bytes > IN_MEMORY_BYTES:
            with tempfile.TemporaryFile(dir=folder) as file:
                # On a full disk, this raises now, instead of a signal later.
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                self._pages = mmap.mmap(file.fileno(), num_bytes)  # once: every map keeps a descriptor open

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A new host tensor, whatever torch's default dtype and device are."""
        numel, size = math.prod(shape), dtype.itemsize
        start = -(-self._end // size) * size
        end = start + numel * size
        if self._pages is None or numel == 0 or end > len(self._pages):
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        self._end = end
        return torch.frombuffer(self._pages, dtype=dtype, count=numel, offset=start).view(tuple(shape))


MEMORY = Scratch(None, 0)
"""Room in memory, without limit."""


@torch.no_grad()
def blended(engine: Engine, average: Tensor, chosen: Readout) -> Tensor:
    """This rank's elements of a blend, elementwise in fp32: exactly the last weights at 0, the average at 1.

    Args:
        engine: provides the last weights.
        average: (engine.numel,), fp32, host; never changed. Returned itself, not a copy, if nothing else is chosen.
        chosen: how far to go, and for which weights.

    Returns:
        (engine.numel,), fp32, host.
    """
    if chosen.blend == 1 and chosen.scope == "all":
        return average
    last = engine.live_shard()
    if chosen.blend == 0:
        return last
    result = average.clone() if chosen.blend == 1 else (average - last).mul_(chosen.blend).add_(last)
    kept, position = outside(engine, chosen.scope), 0
    for fragment in engine.fragments:
        end = position + fragment.numel
        if fragment.name in kept:
            result[position:end] = last[position:end]
        position = end
    return result


def outside(engine: Engine, scope: str) -> set[str]:
    """Names of the trained parameters that a scope leaves unchanged.

    Embeddings are those of every `torch.nn.Embedding`, with whatever is tied to them. The head is everything in a
    Hugging Face model outside its body.

    Raises:
        AveragingError: the model does not say what its head is, or the scope would leave none or all unchanged.
    """
    if scope == "all":
        return set()
    engine.release_gathered()  # FSDP2's gathered copies are not the parameters that are trained
    if scope == "no_embeddings":
        parts = [part for part in engine.module.modules() if isinstance(part, nn.Embedding)]
        kept = {id(parameter) for part in parts for parameter in part.parameters()}
    else:
        model: Any = engine.module.get_base_model() if is_peft(engine.module) else engine.module  # type: ignore[operator]
        prefix = getattr(model, "base_model_prefix", None)
        body = getattr(model, prefix, None) if prefix else None
        if not isinstance(body, nn.Module):
            raise AveragingError(
                f"scope='no_head' was asked of a {type(model).__name__}, which does not say what its head is; "
                "expected a Hugging Face model with a head on its body (base_model_prefix)"
            )
        kept = {id(each) for each in model.parameters()} - {id(each) for each in body.parameters()}
    names = {name for name, parameter in engine.trainable.items() if id(parameter) in kept}
    if not names or len(names) == len(engine.trainable):
        raise AveragingError(
            f"scope={scope!r} would leave {len(names)} of the {len(engine.trainable)} trained parameters as they "
            "are; expected some of them, and not all: choose scope='all'"
        )
    return names


def beside_live(engine: Engine, shard: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of this rank's last weights and the same elements of a shard, in pieces of at most `PIECE`."""
    position = 0
    for last in engine.live():
        yield last, shard[position : position + len(last)]
        position += len(last)


def room_for(engine: Engine, parameters: Mapping[str, nn.Parameter], scratch: Scratch) -> dict[str, Tensor]:
    """Empty whole fp32 tensors on rank 0 (collective; {} elsewhere).

    Raises:
        StateError: there is no room for them; on every rank.
    """
    with engine.ranks.together("there is no room for the whole weights on rank 0", patiently=True):
        if engine.ranks.is_main:
            return {name: scratch.empty(engine.full_shape(each)) for name, each in parameters.items()}
    return {}


def gather_trained(engine: Engine, shard: Tensor, *, scratch: Scratch = MEMORY) -> dict[str, Tensor]:
    """Every trained parameter whole on rank 0's host, from shards (collective; {} elsewhere).

    Args:
        engine: provides the layout.
        shard: (engine.numel,), fp32, host: this rank's elements.
        scratch: where the whole tensors are kept.

    Returns:
        name to (parameter shape), fp32.
    """
    engine.check_shapes()
    ranks, everyone = engine.ranks, engine.ranks.gather(engine.fragments)
    weights = room_for(engine, engine.trainable, scratch)
    if not ranks.is_main:
        for piece in _pieces(shard):
            ranks.send(piece, to=0)
        return {}
    message = torch.empty(PIECE, dtype=torch.float32, device="cpu") if ranks.world_size > 1 else shard
    for rank, first, places in _messages(everyone):
        numel = sum(place.numel for place in places)
        values = message[:numel] if rank else shard[first : first + numel]
        if rank:
            ranks.receive(values, source=rank)
        for place, run in zip(places, values.split([place.numel for place in places]), strict=True):
            weights[place.name].view(-1)[place.start : place.end] = run
    return weights


def scatter_trained(engine: Engine, weights: dict[str, Tensor]) -> Tensor:
    """This rank's shard of tensors that are whole on rank 0: the inverse of :func:`gather_trained` (collective).

    Args:
        engine: provides the layout.
        weights: name to (parameter shape), fp32, host, on rank 0; ignored elsewhere.

    Returns:
        (engine.numel,), fp32, host.
    """
    ranks, everyone = engine.ranks, engine.ranks.gather(engine.fragments)
    mine = torch.empty(engine.numel, dtype=torch.float32, device="cpu")
    if not ranks.is_main:
        for piece in _pieces(mine):
            ranks.receive(piece, source=0)
        return mine
    for rank, first, places in _messages(everyone):
        values = torch.cat([weights[place.name].reshape(-1)[place.start : place.end] for place in places])
        if rank:
            ranks.send(values, to=rank)
        else:
            mine[first : first + len(values)] = values
    return mine


def _pieces(shard: Tensor) -> Sequence[Tensor]:
    """A rank's own messages, as views of its shard; none if it is empty."""
    return shard.split(PIECE) if len(shard) else ()


def _messages(everyone: Sequence[Sequence[Fragment]]) -> Iterator[tuple[int, int, list[Fragment]]]:
    """The messages of all ranks, as :func:`_pieces` cuts them: (rank, first element, its fragments)."""
    for rank, fragments in enumerate(everyone):
        for first in range(0, sum(each.numel for each in fragments), PIECE):
            yield rank, first, section(fragments, first, first + PIECE)
