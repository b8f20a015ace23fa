"""Engines that hold the whole model on every rank: one process, DDP, and DeepSpeed stage 0.

Each rank averages one slice of the concatenated parameters, 1/W of the memory and the work. Publishing sends
each slice to the other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swaft.averaging.engines.base import AppliedSteps, Engine
from swaft.averaging.engines.views import FlatViews
from swaft.averaging.layout import Chunk, Fragment, cut, merge, replicated_fragments

PUBLISH_CHUNK = 1 << 24
"""Elements sent in one broadcast: 64 MiB in fp32, which bounds the device memory that a swap takes."""


class ReplicatedEngine(Engine):
    """Whole weights on every rank; the masters are the parameters themselves or tensors beside them.

    Args:
        name: name of the engine.
        module: the unwrapped model.
        inner_optimizer: the torch optimizer that takes the steps.
        parameters: the optimizer's parameters by master tensor, in an order that all ranks share.
        masters: one fp32 tensor a list of parameters, which holds their elements end to end; ``None`` where the
            parameters are their own masters.
        applied_steps: counts the steps that were taken.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        inner_optimizer: torch.optim.Optimizer,
        *,
        parameters: Sequence[Sequence[nn.Parameter]],
        masters: Sequence[Tensor] | None,
        applied_steps: AppliedSteps,
    ):
        super().__init__(module, inner_optimizer)
        self.name = name
        self._applied_steps = applied_steps
        each = list(chain.from_iterable(parameters))
        self._working = FlatViews(lambda: each)
        self._masters = self._working
        if masters is not None:
            numels = [[p.numel() for p in together] for together in parameters]
            self._masters = FlatViews(lambda: masters, numels=numels)
        self._sizes = [(self.name_of(p), p.numel(), i, 0) for i, p in enumerate(each)]
        self.fragments = self._slice_of(self.ranks.rank)

    def masters(self) -> list[Tensor]:
        """The masters, one flat tensor a parameter."""
        return self._masters()

    def working(self) -> list[Tensor]:
        """The parameters, flattened."""
        return self._working()

    def counted_steps(self) -> int:
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


def _views(chunk: Chunk, buffers: list[Tensor]) -> list[Tensor]:
    return [span.of(buffers) for span in chunk.spans]
