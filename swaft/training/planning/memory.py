"""Memory of one rank, engine by engine: published formulas, a named row for each buffer. Plain numbers.

With W ranks, w bytes an element of the working weights (2 in 16 bits, else 4), N elements of the model, T trained
ones and P = T / W of a rank, padded. Read in torch 2.13, accelerate 1.15 and DeepSpeed 0.19.8.

| row | one process, DDP, stage 0 | ZeRO-1, ZeRO-2 | ZeRO-3 | FSDP2 |
|---|---|---|---|---|
| weights | w N | w N | w P, small ones whole | 4 P, the masters |
| fp32 masters | 4 T at stage 0 in 16 bits | 4 P | 4 P | |
| AdamW's moments | 8 T | 8 P | 8 P | 8 P |
| gradients | w T; DDP's buckets once more | w P, or of the largest weight; stage 1: w T first | w P | 4 P |
| reduce bucket | | its size; twice with `overlap_comm` | its size | |
| gradient on its way | | w of the largest weight | w of the largest weight | 4 of the largest block |
| gathered weights | | after the step, gloo only | within half the reuse distance | a block and what is in none |
| flat fp32 gradient | | 4 of a parameter group | 4 of a sub-group | |

Forward and backward are looked at twice: where backward begins, beside all activations, and where it has ended,
beside all gradients. The moments are there from the first step on. Masters, moments and the fp32 gradients move to
the host where the optimizer is offloaded, the slices of the weights where parameters are. gloo flattens what it
gathers and copies what it scatters; NCCL does neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from swaft.training.planning.step import FP32, Activations, Weight

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

REST = 0
"""The number of the FSDP2 block that holds what lies in no other."""
ALLREDUCE_NUMEL = 500_000_000
"""Elements that DeepSpeed sums at a time at stage 0 (`MEMORY_OPT_ALLREDUCE_SIZE`)."""
FORWARD_BACKWARD, OPTIMIZER_STEP = "forward and backward", "optimizer step"
"""Names of phases."""

Rows = dict[str, int]
"""Bytes by name."""


@dataclass(frozen=True)
class Phase:
    """Memory of one rank at the fullest moment of a part of the run."""

    name: str
    device: Mapping[str, int]
    """Bytes on the rank's device, by name; on a CPU that is the host."""
    host: Mapping[str, int] = field(default_factory=dict)
    """Bytes in host memory, by name."""

    @property
    def device_bytes(self) -> int:
        """All on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All in host memory."""
        return sum(self.host.values())


@dataclass(frozen=True)
class EngineMemory:
    """What an engine holds on the rank that holds most."""

    phases: Sequence[Phase]
    owned: int
    """Master elements that this rank updates, and averages."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What memory depends on."""

    weights: Sequence[Weight]
    activations: Activations
    world_size: int
    on_cpu: bool
    """The ranks compute on the host and communicate over gloo."""
    accumulates: bool = False
    """Several micro-batches make an optimizer step."""

    @property
    def trained(self) -> list[Weight]:
        """Weights that are trained."""
        return [weight for weight in self.weights if weight.group is not None]

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the working weights that are trained."""
        return max(weight.itemsize for weight in self.trained)

    @property
    def copies(self) -> bool:
        """Whether the backend copies what it exchanges."""
        return self.on_cpu and self.world_size > 1

    def by_group(self, sizes: Iterable[int]) -> list[list[int]]:
        """Sort sizes, one a trained weight, into the optimizer's parameter groups."""
        groups: dict[Any, list[int]] = {}
        for weight, size in zip(self.trained, sizes, strict=True):
            groups.setdefault(weight.group, []).append(size)
        return list(groups.values())

    def written(self, size: int) -> int:
        """Elements of a bucket that take memory: a host gives none for pages that nobody writes to."""
        return min(size, numel(self.trained)) if self.on_cpu else size

    def adam_temporaries(self, groups: Sequence[Sequence[int]]) -> int:
        """Most bytes that one step of AdamW takes for itself, on tensors of these elements, by parameter group.

        ``sqrt(v) / c + eps`` is made of two tensors on a CPU, where torch steps one parameter after another, and of
        one, changed in place, on a device, where it steps all parameters of a group together (``foreach``).
        """
        return FP32 * max(2 * max(sizes) if self.on_cpu else sum(sizes) for sizes in groups)

    def phases(
        self, device: Rows, host: Rows, *, begins: Rows, ended: Rows, step: Rows, gather: Rows
    ) -> list[Phase]:
        """Return the phases of a training step.

        Args:
            device: what the device holds throughout.
            host: what is held in host memory throughout.
            begins: what there is beside the activations as backward begins.
            ended: what there is as backward ends.
            step: what the optimizer's step takes; empty: it is made on the host, in what is there.
            gather: what the exchange after it takes; empty: there is none.
        """
        peak, late, left = self.activations
        kept = {"kept of the last micro-batch": left}
        moments = [{"activations": peak} | begins, {"activations": late} | ended]
        phases = [(FORWARD_BACKWARD, max(moments, key=lambda rows: sum(rows.values())))]
        phases += [(OPTIMIZER_STEP, kept | step)] if step else []
        phases += [("gather of the weights", kept | gather)] if gather else []
        return [Phase(name, device | rows, host) for name, rows in phases]


def replicated(run: PlannedRun, *, deepspeed: bool) -> EngineMemory:
    """Memory under one process or DDP, or (``deepspeed``) at stage 0."""
    trained, w = numel(run.trained), run.itemsize
    held = {"weights": nbytes(run.weights), "AdamW's moments": 2 * FP32 * trained}
    gradients = {"gradients": w * trained}
    ended = dict(gradients)
    if deepspeed and w != FP32:
        held["fp32 masters"] = ended["gradients, fp32"] = FP32 * trained
    temporaries = run.adam_temporaries(run.by_group(weight.numel for weight in run.trained))
    step = ended | {"AdamW's temporaries": temporaries}
    if run.world_size > 1:
        if deepspeed:
            ended["flat copy for the sum"] = w * min(trained, ALLREDUCE_NUMEL)
        else:
            held["DDP's buckets"] = FP32 * trained
    begins = gradients if run.accumulates else {}
    phases = run.phases(held, {}, begins=begins, ended=ended, step=step, gather={})
    return EngineMemory(phases, owned=-(-trained // run.world_size))


def zero12(run: PlannedRun, zero: DeepSpeedZeroConfig) -> EngineMemory:
    """Memory under ZeRO-1 or ZeRO-2. Gradients are kept of whole weights, as far as the partition touches them."""
    w, unit, bucket = run.itemsize, 2 * run.world_size, zero.reduce_bucket_size
    groups = run.by_group(weight.numel for weight in run.trained)
    partitions = [-(-sum(sizes) // unit) * 2 for sizes in groups]  # aligned to two elements
    owned, flat = sum(partitions), max(partitions)
    largest = max(weight.numel for weight in run.trained)
    device = {"weights": nbytes(run.weights) - nbytes(run.trained) + w * owned * run.world_size}
    kept = w * sum(max(partition, *sizes) for partition, sizes in zip(partitions, groups, strict=True))
    step = {"gradients of the partition": kept, "flat fp32 gradient": FP32 * flat}
    step["AdamW's temporaries"] = run.adam_temporaries([[flat]])
    host, optimizer = Rows(), {"fp32 masters": FP32 * owned, "AdamW's moments": 2 * FP32 * owned}
    if offloads(zero, "optimizer"):
        device["offload buffer"] = w * largest
        host = optimizer | {"offload buffer": w * largest, "fp32 gradients": FP32 * owned}
        host["staging of the weights"] = w * owned
        kept, step = 0, Rows()
    else:
        device |= optimizer

    begins = {"gradients of the partition": kept * (1 + run.accumulates)}
    reduced = begins | {"reduce bucket": w * (1 + bool(zero.overlap_comm)) * run.written(bucket)}
    if zero.stage == 1 and not zero.overlap_comm:  # all wait for the last micro-batch to be summed
        begins = {"gradients of the partition": kept * run.accumulates}
        ended = reduced | {"gradients": w * numel(run.trained)}
    else:
        begins = reduced
        ended = reduced | {
            "gradient on its way": w * largest * (1 + (run.world_size > 1 and largest > bucket))
        }
    gather = {"gloo's copy of gathered weights": w * run.world_size * flat} if run.copies else {}
    phases = run.phases(device, host, begins=begins, ended=ended, step=step, gather=gather)
    return EngineMemory(phases, owned=owned)


def zero3(run: PlannedRun, zero: DeepSpeedZeroConfig) -> EngineMemory:
    """Memory under ZeRO-3.

    A weight stays gathered from its forward to its backward where fewer than the reuse distance of elements lie
    between: that is so for the last half of that distance before the turn. What is fetched ahead comes on top.
    """
    w, weights = run.itemsize, run.weights
    slices = [-(-weight.numel // run.world_size) for weight in run.trained]
    owned, largest = sum(slices), max(weight.numel for weight in weights)
    frozen = sum(-(-weight.nbytes // run.world_size) for weight in weights if weight.group is None)
    small = [weight for weight in weights if weight.numel <= zero.param_persistence_threshold]
    # In fp32 as well: DeepSpeed's test for slices that could serve compares a torch.device with a string.
    optimizer = {"fp32 masters": FP32 * owned, "AdamW's moments": 2 * FP32 * owned}
    optimizer["gradient slices"] = w * owned
    device = {"small weights, whole": nbytes(small)}
    device["reduce bucket"] = w * run.written(zero.reduce_bucket_size)
    flat = min(zero.sub_group_size + max(slices), max(map(sum, run.by_group(slices))))  # ends once it is full
    step = {"flat fp32 gradient": FP32 * flat, "AdamW's temporaries": run.adam_temporaries([[flat]])}
    host = Rows()
    (host if offloads(zero, "param") else device)["slices of the weights"] = w * owned + frozen
    if offloads(zero, "optimizer"):
        host |= optimizer | {"fp32 gradients": FP32 * owned}
        step = {}
    else:
        device |= optimizer
    ahead = max(zero.max_reuse_distance // 2, zero.prefetch_bucket_size)
    begins = {"gathered weights": w * min(numel(weights) - numel(small), ahead + largest)}
    ended = {"gathered weights": w * largest, "gradient on its way": w * largest * (1 + run.copies)}
    phases = run.phases(device, host, begins=begins, ended=ended, step=step, gather={})
    return EngineMemory(phases, owned=owned)


def fsdp2(run: PlannedRun, *, reshards: bool) -> EngineMemory:
    """Memory under FSDP2, of the first rank, whose slices are the largest: parameters are cut by rows.

    In backward one block is whole while the buffer of the next is being filled. It is freed before its gradients
    are copied and summed, all at once. What lies in no block is whole throughout.

    Args:
        run: what is planned.
        reshards: a block's gathered weights are freed after its forward.
    """
    weights, w = run.weights, run.itemsize
    slices = [-(-weight.rows // run.world_size) * (weight.numel // max(weight.rows, 1)) for weight in weights]
    own = [size for size, weight in zip(slices, weights, strict=True) if weight.group is not None]
    held = {"slices of the weights": FP32 * sum(slices), "AdamW's moments": 2 * FP32 * sum(own)}
    whole, trained = Counter[int](), Counter[int]()
    for weight in weights:
        whole[weight.block] += weight.nbytes
        trained[weight.block] += weight.numel if weight.group is not None else 0
    rest, last = whole.pop(REST, 0), max(trained)
    buffered = (1 + run.copies) * whole[last]
    gradients = {"gradients": FP32 * sum(own)}
    begins = {"gathered weights": rest + buffered + (whole[last] if reshards else whole.total())}
    summed = max(w + FP32, FP32 * (1 + run.copies))  # bytes of a gradient's element, copied in, then summed
    ended = gradients | {"gathered weights": rest, "gradient on its way": summed * max(trained.values())}
    step = gradients | {"AdamW's temporaries": run.adam_temporaries(run.by_group(own))}
    begins |= gradients if run.accumulates else {}
    phases = run.phases(held, {}, begins=begins, ended=ended, step=step, gather={})
    return EngineMemory(phases, owned=sum(own))


def numel(weights: Iterable[Weight]) -> int:
    """Elements of all of them."""
    return sum(weight.numel for weight in weights)


def nbytes(weights: Iterable[Weight]) -> int:
    """Bytes of all of them, as working weights."""
    return sum(weight.nbytes for weight in weights)


def offloads(zero: DeepSpeedZeroConfig, part: str) -> bool:
    """Whether ``optimizer`` or ``param`` is kept on the host."""
    offload = getattr(zero, f"offload_{part}")
    return offload is not None and offload.device != "none"
