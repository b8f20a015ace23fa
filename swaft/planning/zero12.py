"""Memory of DeepSpeed ZeRO stages 1 and 2, read in DeepSpeed 0.19.8 (`stage_1_and_2.py`).

With W ranks, w bytes an element (2 in 16 bits, 4 in fp32), N all elements, T the trained ones, P = T / W padded:

| term | bytes | where it comes from |
|---|---|---|
| weights | w N | `bit16_groups_flat`, which the parameters are views of, and the frozen ones |
| masters | 4 P | `single_partition_of_fp32_groups`, also where the weights are fp32 |
| moments | 8 P | AdamW's two, from the first step on |
| reduce bucket | w reduce_bucket_size | `IPGBucket.buffer` while backward runs; twice with `overlap_comm` |
| copy for the sum | w of what is summed | `allreduce_bucket` flattens the slices; one slice needs no copy |
| gradients of the partition | w S | `grads_in_partition`: whole parameters that it touches; twice to accumulate |
| oversized gradient | w n | one larger than the bucket stays where it is until it is summed |
| all gradients (stage 1) | w T | they wait for the last micro-batch |
| flat gradient | w P + 4 P | `step`: flattened and cast, one parameter group after another; in fp32 once |
| gathered weights | w T of a group | gloo flattens what it gathers; NCCL does not |

Offloaded to the host are masters, moments, the fp32 gradient partition (4 P), a 16-bit staging copy (w P) and one
buffer of the largest parameter (w n), which the device has too; AdamW's step (DeepSpeedCPUAdam) then takes nothing
more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swaft.planning.memory import FP32, EngineMemory, Phase, Run, adam_temporaries
from swaft.planning.trace import Moment

ALIGNMENT = 2
"""Elements that a partition is aligned to (`nccl_start_alignment_factor`)."""
REDUCE_BUCKET_SIZE = 500_000_000
"""DeepSpeed's default, in elements."""


def zero12_memory(
    run: Run, moments: Sequence[Moment], zero: Mapping[str, Any], *, stage: int
) -> EngineMemory:
    """Return what the fullest rank holds under ZeRO-1 or ZeRO-2.

    Args:
        run: how the model is trained.
        moments: of one micro-batch.
        zero: section ``zero_optimization`` of the filled configuration.
        stage: 1 or 2.
    """
    itemsize = max(weight.itemsize for weight in run.weights if weight.group is not None)
    partition = {group: _partition_numel(run.numel_of(group), run.world_size) for group in run.groups}
    owned = sum(partition.values())
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    optimizer = {"fp32 masters": FP32 * owned, "AdamW's moments": 2 * FP32 * owned}
    device = {"weights": run.frozen_bytes + itemsize * owned * run.world_size}
    host: dict[str, int] = {}
    if offloaded:
        largest = max(weight.nbytes for weight in run.weights if weight.group is not None)
        device["offload buffer"] = largest
        host = optimizer | {
            "fp32 gradients": FP32 * owned,
            "staging of the weights": itemsize * owned,
            "offload buffer": largest,
        }
    else:
        device |= optimizer

    replay = _Replay(run, zero, itemsize=itemsize, stage=stage, offloaded=offloaded, partition=partition)
    backward = replay.fullest(moments)
    kept = {"kept of the last micro-batch": run.kept_bytes}
    phases = [Phase("forward and backward", device | backward, host)]
    if not offloaded:
        phases.append(Phase("optimizer step", device | kept | replay.step(), host))
    if run.on_cpu and run.world_size > 1:
        gathered = {"gloo's copy of gathered weights": itemsize * run.world_size * max(partition.values())}
        phases.append(Phase("gather of the weights", device | kept | gathered, host))
    return EngineMemory(phases, owned=owned)


def _partition_numel(numel: int, world_size: int) -> int:
    """Elements of one rank's partition of a group, padded."""
    unit = ALIGNMENT * world_size
    return -(-numel // unit) * unit // world_size


@dataclass
class _Replay:
    """What DeepSpeed holds of the gradients while backward makes them, on the rank that holds most."""

    run: Run
    zero: Mapping[str, Any]
    itemsize: int
    stage: int
    offloaded: bool
    partition: Mapping[int, int]
    _elements: int = 0
    """In the bucket now."""
    _oversized: int = 0
    """Elements of the gradient that waits outside of the bucket."""
    _waiting: list[int] = field(default_factory=list)
    """Parameters whose gradients are in the bucket or wait."""
    _kept: int = 0
    """Elements of the partition's gradients, from the first that is summed."""
    _all: int = 0
    """Elements of gradients that wait for the end (stage 1)."""

    def __post_init__(self) -> None:
        self._owners, self._rank, self.touched = _layout(self.run, self.partition)

    @property
    def bucket_size(self) -> int:
        """Elements of the reduce bucket."""
        return int(self.zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE))

    def fullest(self, moments: Sequence[Moment]) -> dict[str, int]:
        """Return the rows of the fullest moment of forward and backward."""
        fullest: dict[str, int] = {}
        overlap = bool(self.zero.get("overlap_comm"))
        carried = self.touched if self.run.accumulation_steps > 1 and not self.offloaded else 0
        # On the host, pages that are never written to take no memory.
        buffer = min(self.bucket_size, self.run.trainable) if self.run.on_cpu else self.bucket_size
        bucket = 0

        def look(activations: int, **transient: int) -> None:
            nonlocal fullest
            rows = {
                "activations": activations,
                "reduce bucket": bucket,
                "gradients of the partition": self.itemsize * (self._kept + carried),
                "gradients on their way": self.itemsize * (self._oversized + self._all)
                + transient.get("gradient", 0),
                "copy for the sum": transient.get("copy", 0),
            }
            fullest = max(fullest, rows, key=lambda each: sum(each.values()))

        def reduce(live: int, gradient: int) -> None:
            copy = self.itemsize * self._summed_copy()
            look(live, gradient=gradient, copy=copy)
            if not self.offloaded and any(self._rank in self._owners[number] for number in self._waiting):
                self._kept = self.touched
                look(live, gradient=gradient)
            self._elements = self._oversized = 0
            self._waiting = []

        for moment in moments:
            look(moment.peak_bytes)
            if moment.kind != "gradient":
                continue
            (number,) = moment.parameters
            numel = self.run.weights[number].numel
            if self.stage == 1 and not overlap:
                self._all += numel
                continue
            bucket = self.itemsize * buffer * (2 if overlap else 1)
            if self._elements + numel > self.bucket_size and self._waiting:
                reduce(moment.live_bytes, self.itemsize * numel)
            look(moment.live_bytes, gradient=self.itemsize * numel)
            self._elements += numel
            self._waiting.append(number)
            if numel > self.bucket_size:
                self._oversized = numel
        end = moments[-1].live_bytes
        if self.stage == 1 and not overlap:
            bucket, self._kept = self.itemsize * buffer, self.touched
            look(end)
        elif self._waiting:
            reduce(end, 0)
        return fullest

    def step(self) -> dict[str, int]:
        """Return the rows of the optimizer step of the largest group, which comes first."""
        partition = self.partition[max(self.partition, key=lambda group: self.partition[group])]
        flat = FP32 * partition
        temporaries = adam_temporaries([partition], on_cpu=self.run.on_cpu)
        casting = self.itemsize * partition if self.itemsize != FP32 else 0
        return {
            "gradients of the partition": self.itemsize * self.touched,
            "flat fp32 gradient": flat,
            "AdamW's temporaries": max(temporaries, casting),
        }

    def _summed_copy(self) -> int:
        """Elements that are flattened for the sum: none where all of them go to one rank."""
        owners = {owner for number in self._waiting for owner in self._owners[number]}
        return sum(self.run.weights[number].numel for number in self._waiting) if len(owners) > 1 else 0


def _layout(run: Run, partition: Mapping[int, int]) -> tuple[dict[int, range], int, int]:
    """Return which ranks own a part of each parameter, the rank whose partitions touch most, and how much.

    A group's parameters lie end to end, cut into one partition a rank. A rank keeps the whole gradient of every
    parameter that its partitions touch.
    """
    owners: dict[int, range] = {}
    touched = np.zeros(run.world_size + 1, dtype=np.int64)
    ends = dict.fromkeys(partition, 0)
    for number, weight in enumerate(run.weights):
        if weight.group is None or not weight.numel:
            continue
        first, ends[weight.group] = ends[weight.group], ends[weight.group] + weight.numel
        size = partition[weight.group]
        owners[number] = range(first // size, (ends[weight.group] - 1) // size + 1)
        touched[owners[number].start] += weight.numel
        touched[owners[number].stop] -= weight.numel
    by_rank = touched.cumsum()[:-1]
    return owners, int(by_rank.argmax()), int(by_rank.max())
