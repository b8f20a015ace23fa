"""DeepSpeed ZeRO stages 1 and 2: masters flat by parameter group, cut into one partition a rank.

Read in DeepSpeed 0.19.8 (`stage_1_and_2.py`, `bf16_optimizer.py`). The public fragment mapping is not used: with
`round_robin_gradients` it names the wrong parameters, and it is rebuilt at every load. The layout is taken from
the lists the buffers were made from, and proved bit for bit by :meth:`Engine.prove_layout`.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swaft.averaging.engines.base import Engine
from swaft.averaging.engines.deepspeed_modes import DEEPSPEED_CALLS
from swaft.averaging.layout import Fragment


class _Buffers(list[Tensor]):
    """A list that can be referred to weakly."""

    __slots__ = ("__weakref__",)


class PartitionedEngine(Engine):
    """Engines whose masters are a few flat partitions, fetched anew each time.

    DeepSpeed replaces the storage of these tensors (a checkpoint load, and `offload_states`, which is there to
    free it), so nothing here keeps it: the list handed out last is known only as long as somebody holds it.
    """

    lends_storage = True
    hands_out = DEEPSPEED_CALLS

    def __init__(self, deepspeed_engine: Any):
        super().__init__(deepspeed_engine.module, deepspeed_engine.optimizer.optimizer)
        self.outer = deepspeed_engine
        self._zero = deepspeed_engine.optimizer
        self._handed_out: Callable[[], _Buffers | None] = lambda: None
        self._addresses: list[int] = []

    def masters(self) -> list[Tensor]:
        """The fp32 partitions that this rank's optimizer updates."""
        current = self._master_partitions()
        addresses = [tensor.data_ptr() for tensor in current]
        buffers = self._handed_out()
        if buffers is None or addresses != self._addresses:
            buffers = _Buffers(tensor.detach() for tensor in current)
            self._handed_out, self._addresses = weakref.ref(buffers), addresses
        return buffers

    def counted_steps(self) -> int:
        """Steps DeepSpeed took less those it skipped; `was_step_applied` is stale between boundaries."""
        return self.outer.global_steps - self.outer.skipped_steps

    @abstractmethod
    def _master_partitions(self) -> list[Tensor]:
        """The wrapper's own list of master partitions."""


class Zero12Engine(PartitionedEngine):
    """`DeepSpeedZeroOptimizer`, stage 1 or 2."""

    def __init__(self, deepspeed_engine: Any):
        super().__init__(deepspeed_engine)
        self.name = f"deepspeed-zero{deepspeed_engine.zero_optimization_stage()}"
        self.fragments = [
            fragment
            for i, group in enumerate(self._zero.round_robin_bit16_groups)
            for fragment in _partition_fragments(
                [(self.name_of(p), p.numel()) for p in group],
                offsets=self._zero.round_robin_bit16_offsets[i],
                first=self._zero.partition_size[i] * self.ranks.rank,
                length=self._zero.partition_size[i],
                buffer=i,
            )
        ]

    def working(self) -> list[Tensor]:
        """This rank's partitions of the flat working weights."""
        groups = self._zero.parallel_partitioned_bit16_groups
        return [partitions[self.ranks.rank].detach() for partitions in groups]

    def publish(self) -> None:
        """All-gather the flat groups, as DeepSpeed does after a step (collective)."""
        _all_gather(self._zero, self._zero.bit16_groups_flat, self._zero.parallel_partitioned_bit16_groups)

    def _master_partitions(self) -> list[Tensor]:
        return self._zero.single_partition_of_fp32_groups


class BF16Engine(PartitionedEngine):
    """`BF16_Optimizer`: stage 1 in bf16 with fp32 gradient accumulation."""

    name = "deepspeed-zero1-bf16"

    def __init__(self, deepspeed_engine: Any):
        super().__init__(deepspeed_engine)
        self.fragments = []
        for i, group in enumerate(self._zero.bf16_groups):
            sizes = [(self.name_of(p), p.numel()) for p in group]
            length = self._zero.fp32_groups_flat_partition[i].numel()
            self.fragments += _partition_fragments(
                sizes,
                offsets=_running_sum([numel for _, numel in sizes]),
                first=length * self.ranks.rank,
                length=length,
                buffer=i,
            )

    def working(self) -> list[Tensor]:
        """This rank's partitions of the flat bf16 weights."""
        return [partitions[self.ranks.rank].detach() for partitions in self._zero.bf16_partitioned_groups]

    def publish(self) -> None:
        """All-gather the flat groups, as DeepSpeed does after a step (collective)."""
        _all_gather(self._zero, self._zero.bf16_groups_flat, self._zero.bf16_partitioned_groups)

    def _master_partitions(self) -> list[Tensor]:
        return self._zero.fp32_groups_flat_partition


def _partition_fragments(
    sizes: list[tuple[str, int]], *, offsets: list[int], first: int, length: int, buffer: int
) -> list[Fragment]:
    """The parts of the parameters of one flat group that fall into ``[first, first + length)``."""
    fragments = []
    for (name, numel), offset in zip(sizes, offsets, strict=True):
        start, end = max(first - offset, 0), min(first + length - offset, numel)
        if start < end:
            fragments.append(Fragment(name, start, end, buffer, offset + start - first))
    return fragments


def _running_sum(numels: list[int]) -> list[int]:
    total, sums = 0, []
    for numel in numels:
        sums.append(total)
        total += numel
    return sums


@torch.no_grad()
def _all_gather(zero: Any, groups_flat: list[Tensor], partitioned_groups: list[list[Tensor]]) -> None:
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=groups_flat,
        partitioned_param_groups=partitioned_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
