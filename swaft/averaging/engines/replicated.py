"""Engines that hold the whole model on every rank: one process, DDP, and DeepSpeed stage 0.

Each rank averages one slice of the concatenated parameters, 1/W of the memory and the work. Publishing sends
each slice to the other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swaft.averaging.engines.base import AppliedSteps, Engine
from swaft.averaging.layout import Chunk, Fragment, cut, merge, replicated_fragments
from swaft.errors import LayoutError

PUBLISH_CHUNK = 1 << 24
"""Elements sent in one broadcast: 64 MiB in fp32, which bounds the device memory that a swap takes."""


class ReplicatedEngine(Engine):
    """Whole weights on every rank; the masters are the parameters themselves or tensors beside them.

    Args:
        name: name of the engine.
        module: the unwrapped model.
        inner_optimizer: the torch optimizer that takes the steps.
        parameters: the optimizer's parameters, in an order that all ranks share.
        master_tensors: fp32 tensors of the same shapes; ``None`` where the parameters are their own masters.
        applied_steps: counts the steps that were taken.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        inner_optimizer: torch.optim.Optimizer,
        *,
        parameters: Sequence[nn.Parameter],
        master_tensors: Sequence[Tensor] | None,
        applied_steps: AppliedSteps,
    ):
        super().__init__(module, inner_optimizer)
        self.name = name
        self._applied_steps = applied_steps
        self._parameters = list(parameters)
        self._master_tensors = list(parameters) if master_tensors is None else list(master_tensors)
        self._bind()
        self._sizes = [(self.names[id(p)], p.numel(), i, 0) for i, p in enumerate(self._parameters)]
        self.fragments = self._slice_of(self.ranks.rank)

    def masters(self) -> list[Tensor]:
        """The master tensors, flattened."""
        self._follow_storage()
        return self._masters

    def working(self) -> list[Tensor]:
        """The parameters, flattened."""
        self._follow_storage()
        return self._working

    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights."""
        return self._applied_steps()

    @torch.no_grad()
    def publish(self) -> None:
        """Send every rank's slice of the working weights to the others, in bounded pieces (collective)."""
        if self.ranks.world_size == 1:
            return
        working = self.working()
        for rank in range(self.ranks.world_size):
            for chunk in cut(merge(self._slice_of(rank)), PUBLISH_CHUNK):
                packed = torch.cat(_views(chunk, working))
                dist.broadcast(packed, src=rank)
                if rank != self.ranks.rank:
                    views = _views(chunk, working)
                    for view, values in zip(views, packed.split([v.numel() for v in views]), strict=True):
                        view.copy_(values)

    def _slice_of(self, rank: int) -> list[Fragment]:
        return replicated_fragments(self._sizes, rank=rank, world_size=self.ranks.world_size)

    def _follow_storage(self) -> None:
        # Somebody may give a parameter other storage (`module.to`, `weight.data = weight.data.clamp(-1, 1)`), and
        # views of the old one would be averaged from then on. `map` asks every tensor without a loop in Python.
        if self._storage() != self._bound:
            self._bind()

    def _storage(self) -> list[int]:
        return [*map(Tensor.data_ptr, self._parameters), *map(Tensor.data_ptr, self._master_tensors)]

    def _bind(self) -> None:
        self._masters = [_flat(tensor) for tensor in self._master_tensors]
        self._working = [_flat(parameter) for parameter in self._parameters]
        self._bound = self._storage()


def _flat(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise LayoutError(
            f"a trainable tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}, expected a "
            "contiguous one; call `.contiguous()` on it before the optimizer is built"
        )
    return tensor.detach().view(-1)


def _views(chunk: Chunk, buffers: list[Tensor]) -> list[Tensor]:
    return [buffers[span.buffer].narrow(0, span.offset, span.numel) for span in chunk.spans]
