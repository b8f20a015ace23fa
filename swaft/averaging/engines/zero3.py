"""DeepSpeed ZeRO stage 3: masters flat by sub-group, every parameter cut into one padded slice a rank.

Read in DeepSpeed 0.19.8 (`stage3.py`). The padding is uninitialised memory; no fragment covers it, so it is
neither averaged nor checked nor saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swaft.averaging.engines.zero12 import PartitionedEngine
from swaft.averaging.layout import Fragment


class Zero3Engine(PartitionedEngine):
    """`DeepSpeedZeroOptimizer_Stage3`, optimizer and parameters on the device or in host memory."""

    name = "deepspeed-zero3"

    def __init__(self, deepspeed_engine: Any):
        super().__init__(deepspeed_engine)
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

    def _master_partitions(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat


def _slice_fragments(sizes: list[tuple[str, int, int]], *, rank: int, buffer: int) -> list[Fragment]:
    """A rank's slice of every parameter of one sub-group; empty where the parameter ends before it."""
    fragments, offset = [], 0
    for name, numel, slice_numel in sizes:
        start, end = rank * slice_numel, min((rank + 1) * slice_numel, numel)
        if start < end:
            fragments.append(Fragment(name, start, end, buffer, offset))
        offset += slice_numel
    return fragments
