"""DeepSpeed ZeRO: fp32 masters flat by parameter group (stages 1 and 2) or by sub-group of them (stage 3).

Read in DeepSpeed 0.19.8 (`stage_1_and_2.py`, `bf16_optimizer.py`, `stage3.py`). The public fragment mapping is not
used: with `round_robin_gradients` it names the wrong parameters, and it is rebuilt at every load. The layout is
taken from the lists the buffers were made from, and proved bit for bit by :meth:`Engine.prove_layout`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from swaft.averaging.engines.base import Engine
from swaft.averaging.engines.deepspeed_modes import DEEPSPEED_CALLS, deepspeed_steps
from swaft.averaging.layout import Fragment


class _Buffers(list[Tensor]):
    """A list that can be referred to weakly."""

    __slots__ = ("__weakref__",)


class ZeroEngine(Engine):
    """Engines whose masters are a few flat partitions, fetched anew each time.

    DeepSpeed replaces the storage of these tensors (a checkpoint load, and `offload_states`, which is there to
    free it), so nothing here keeps it: the list handed out last is known only as long as somebody holds it.

    Args:
        name: name of the engine.
        deepspeed_engine: what DeepSpeed made of the model.
        masters: attribute of its optimizer that lists the master partitions.
    """

    lends_storage = True
    hands_out = DEEPSPEED_CALLS

    def __init__(self, name: str, deepspeed_engine: Any, *, masters: str):
        steps = partial(deepspeed_steps, deepspeed_engine)
        super().__init__(name, deepspeed_engine.module, deepspeed_engine.optimizer.optimizer, steps)
        self.outer = deepspeed_engine
        self._zero = deepspeed_engine.optimizer
        self._list_of_masters = masters
        self._handed_out: Callable[[], _Buffers | None] = lambda: None
        self._addresses: list[int] = []

    def masters(self) -> list[Tensor]:
        """The fp32 partitions that this rank's optimizer updates."""
        current = getattr(self._zero, self._list_of_masters)
        addresses = [tensor.data_ptr() for tensor in current]
        buffers = self._handed_out()
        if buffers is None or addresses != self._addresses:
            buffers = _Buffers(tensor.detach() for tensor in current)
            self._handed_out, self._addresses = weakref.ref(buffers), addresses
        return buffers


class Zero12Engine(ZeroEngine):
    """`DeepSpeedZeroOptimizer`, stage 1 or 2, and `BF16_Optimizer`: stage 1 in bf16 with gradients summed in fp32.

    A parameter group is flat, and cut into one partition a rank.
    """

    def __init__(self, deepspeed_engine: Any, *, bf16_optimizer: bool = False):
        if bf16_optimizer:
            super().__init__("deepspeed-zero1-bf16", deepspeed_engine, masters="fp32_groups_flat_partition")
            groups, self._list_of_working = self._zero.bf16_groups, "bf16_partitioned_groups"
            offsets = [[0, *accumulate(p.numel() for p in group)][:-1] for group in groups]
            self._flat = "bf16_groups_flat"
        else:
            name = f"deepspeed-zero{deepspeed_engine.zero_optimization_stage()}"
            super().__init__(name, deepspeed_engine, masters="single_partition_of_fp32_groups")
            groups, offsets = self._zero.round_robin_bit16_groups, self._zero.round_robin_bit16_offsets
            self._list_of_working, self._flat = "parallel_partitioned_bit16_groups", "bit16_groups_flat"
        lengths = [master.numel() for master in self.masters()]
        self.fragments = [
            fragment
            for i, group in enumerate(groups)
            for fragment in _partition_fragments(
                [(self.name_of(p), p.numel(), offset) for p, offset in zip(group, offsets[i], strict=True)],
                first=lengths[i] * self.ranks.rank,
                length=lengths[i],
                buffer=i,
            )
        ]

    def working(self) -> list[Tensor]:
        """This rank's partitions of the flat working weights."""
        groups = getattr(self._zero, self._list_of_working)
        return [partitions[self.ranks.rank].detach() for partitions in groups]

    @torch.no_grad()
    def publish(self) -> None:
        """All-gather the flat groups, as DeepSpeed does after a step (collective)."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=getattr(self._zero, self._flat),
            partitioned_param_groups=getattr(self._zero, self._list_of_working),
            dp_process_group=self._zero.real_dp_process_group,
            start_alignment_factor=self._zero.nccl_start_alignment_factor,
            allgather_bucket_size=self._zero.allgather_bucket_size,
        )


class Zero3Engine(ZeroEngine):
    """`DeepSpeedZeroOptimizer_Stage3`, optimizer and parameters on the device or in host memory.

    Every parameter of a sub-group is cut into one padded slice a rank. The padding is uninitialised memory; no
    fragment covers it, so it is neither averaged nor checked nor saved.
    """

    def __init__(self, deepspeed_engine: Any):
        super().__init__("deepspeed-zero3", deepspeed_engine, masters="fp32_partitioned_groups_flat")
        self.fragments = [
            fragment
            for i, sub_group in enumerate(self._zero.fp16_groups)
            for fragment in _slice_fragments(
                [(self.name_of(p), p.ds_numel, p.partition_numel()) for p in sub_group],
                rank=self.ranks.rank,
                buffer=i,
            )
        ]

    def working(self) -> list[Tensor]:
        """This rank's flat sub-groups of the working weights."""
        return [tensor.detach() for tensor in self._zero.fp16_partitioned_groups_flat]

    def publish(self) -> None:
        """Gather the always-resident small parameters anew and drop node-local copies (collective)."""
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        self._zero.invalidate_secondary_tensor()

    def release_gathered(self) -> None:
        """Partition everything, so that no gathered copy of the weights outlives a change of the shards."""
        self._zero.empty_partition_cache()

    def gather_working(self, parameter: nn.Parameter) -> Tensor:
        """A parameter whole, as forwards see it, in host memory, on every rank (collective)."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter."""
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]


def _slice_fragments(sizes: list[tuple[str, int, int]], *, rank: int, buffer: int) -> list[Fragment]:
    """A rank's slice of every parameter of one sub-group; empty where the parameter ends before it."""
    fragments, offset = [], 0
    for name, numel, slice_numel in sizes:
        start, end = rank * slice_numel, min((rank + 1) * slice_numel, numel)
        if start < end:
            fragments.append(Fragment(name, start, end, buffer, offset))
        offset += slice_numel
    return fragments


def _partition_fragments(
    sizes: Sequence[tuple[str, int, int]], *, first: int, length: int, buffer: int
) -> list[Fragment]:
    """The parts of one flat group's parameters (name, numel, offset) that fall into ``[first, first + length)``."""
    fragments = []
    for name, numel, offset in sizes:
        start, end = max(first - offset, 0), min(first + length - offset, numel)
        if start < end:
            fragments.append(Fragment(name, start, end, buffer, offset + start - first))
    return fragments
