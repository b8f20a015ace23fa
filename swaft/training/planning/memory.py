"""Memory of one rank, engine by engine: published formulas, a named row for each buffer. Plain numbers.

With W ranks, w bytes an element of the working weights (2 in 16 bits, else 4), N elements of the model, T trained
ones and P = T / W of a rank, padded. Read in torch 2.13, accelerate 1.15 and DeepSpeed 0.19.8.

| row | one process, DDP, stage 0 | ZeRO-1, ZeRO-2 | ZeRO-3 | FSDP2 |
|---|---|---|---|---|
| weights | w N | w N | w P, small ones whole | 4 P, the masters |
| fp32 masters | 4 T at stage 0 in 16 bits | 4 P | 4 P | |
| AdamW's moments | 8 T | 8 P | 8 P | 8 P |
| gradients | w T; DDP's buckets once more | w of what the partition touches; stage 1: w T first | w P | 4 P |
| reduce bucket | | its size; twice with `overlap_comm` | its size | 4 of a block |
| gathered weights | | after the step, gloo only | within half the reuse distance | a block and what is in none |
| flat fp32 gradient | | 4 of a parameter group | 4 of a sub-group | |

The moments are there from the first step on. Masters, moments and the fp32 gradients move to the host where the
optimizer is offloaded, the slices of the weights where parameters are. gloo flattens what it gathers and copies
what it scatters; NCCL does neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from swaft.training.planning.step import FP32, TracedStep, Weight

REST = 0
"""The number of the FSDP2 block that holds what lies in no other."""
ALLREDUCE_NUMEL = 500_000_000
"""Elements that DeepSpeed sums at a time at stage 0 (`MEMORY_OPT_ALLREDUCE_SIZE`)."""
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
"""DeepSpeed's own, in elements."""
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
    """A traced step, and what else memory depends on."""

    step: TracedStep
    world_size: int
    on_cpu: bool
    """The ranks compute on the host and communicate over gloo."""
    accumulates: bool = False
    """Several micro-batches make an optimizer step."""

    @property
    def trained(self) -> list[Weight]:
        """Weights that are trained."""
        return [weight for weight in self.step.weights if weight.group is not None]

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

    def fullest(
        self,
        *,
        gradients: Callable[[int], int],
        passing: Callable[[int], int] = lambda number: 0,
        gathered: Callable[[int, int], int] = lambda done, number: 0,
    ) -> Rows:
        """Return the rows of the fullest moment of forward and backward.

        Args:
            gradients: bytes held of gradients once this many elements have theirs.
            passing: bytes that the gradient of the weight of this number takes beside that while it is handed over.
            gathered: bytes of weights gathered once this many elements have their gradients, and the weight of this
                number is the next to get its own (-1 after the last).
        """

        def moments() -> Iterator[Rows]:
            done = 0
            order = [moment.parameter for moment in self.step.moments if moment.parameter is not None]
            following = iter([order[0] if order else -1, *order, -1])
            for moment, number in zip(self.step.moments, following, strict=True):
                rows = {"activations": moment.peak_bytes, "gradients": gradients(done)}
                yield rows | {"gathered weights": gathered(done, number)}
                if moment.parameter is not None:
                    done += self.step.weights[number].numel
                    rows = {"activations": moment.live_bytes, "gradients": gradients(done)}
                    rows["gradients handed over"] = passing(number)
                    yield rows | {"gathered weights": gathered(done, number)}

        return max(moments(), key=lambda rows: sum(rows.values()))

    @property
    def kept(self) -> Rows:
        """What a micro-batch leaves until the next one: its logits, for the most part."""
        return {"kept of the last micro-batch": self.step.moments[-1].live_bytes if self.step.moments else 0}

    def written(self, size: int) -> int:
        """Elements of a bucket that take memory: a host gives none for pages that nobody writes to."""
        return min(size, numel(self.trained)) if self.on_cpu else size

    def step_phase(self, held: Rows, groups: Sequence[Sequence[int]], host: Rows | None = None) -> Phase:
        """Return the optimizer step: what is held meanwhile, and AdamW on tensors of these sizes."""
        temporaries = {"AdamW's temporaries": adam_temporaries(groups, on_cpu=self.on_cpu)}
        return Phase(OPTIMIZER_STEP, held | self.kept | temporaries, host or {})


def replicated(run: PlannedRun, *, deepspeed: bool) -> EngineMemory:
    """Memory under one process or DDP, or (``deepspeed``) at stage 0."""
    trained, w = numel(run.trained), run.itemsize
    held = {"weights": nbytes(run.step.weights), "AdamW's moments": 2 * FP32 * trained}
    if deepspeed and w != FP32:
        held["fp32 masters"] = FP32 * trained
    if not deepspeed and run.world_size > 1:
        held["DDP's buckets"] = FP32 * trained
    backward = run.fullest(gradients=lambda done: w * (trained if run.accumulates else done))
    step = {"gradients": w * trained}
    if "fp32 masters" in held:
        step["gradients, fp32"] = FP32 * trained
    groups = run.by_group(weight.numel for weight in run.trained)
    phases = [Phase(FORWARD_BACKWARD, held | backward), run.step_phase(held | step, groups)]
    if deepspeed and run.world_size > 1:
        copy = w * min(trained, ALLREDUCE_NUMEL)
        phases.insert(1, Phase("sum of gradients", held | step | run.kept | {"flat copy for the sum": copy}))
    return EngineMemory(phases, owned=-(-trained // run.world_size))


def zero12(run: PlannedRun, zero: Mapping[str, Any]) -> EngineMemory:
    """Memory under ZeRO-1 or ZeRO-2, from the filled section ``zero_optimization``."""
    w, trained, unit = run.itemsize, numel(run.trained), 2 * run.world_size
    groups = run.by_group(weight.numel for weight in run.trained)
    partitions = [-(-sum(sizes) // unit) * 2 for sizes in groups]  # aligned to two elements
    owned, touched = sum(partitions), w * _touched(run.world_size, groups, partitions)
    frozen = nbytes(run.step.weights) - nbytes(run.trained)
    device, host = {"weights": frozen + w * owned * run.world_size}, Rows()
    optimizer = {"fp32 masters": FP32 * owned, "AdamW's moments": 2 * FP32 * owned}
    offloaded = offloads(zero, "optimizer")
    if offloaded:
        buffer = {"offload buffer": max(weight.nbytes for weight in run.trained)}
        host = optimizer | buffer | {"fp32 gradients": FP32 * owned, "staging of the weights": w * owned}
        device |= buffer
    else:
        device |= optimizer

    overlaps, size = bool(zero.get("overlap_comm")), setting(zero, "reduce_bucket_size")
    bucket = w * (1 + overlaps) * run.written(size)
    kept = 0 if offloaded else touched
    carried = kept if run.accumulates else 0
    if zero.get("stage") == 1 and not overlaps:  # all gradients wait for the last micro-batch to be summed
        backward = run.fullest(gradients=lambda done: carried + w * done)
        summed = {"gradients": w * trained + kept + carried, "reduce bucket": bucket}
        backward = max(backward, summed, key=lambda rows: sum(rows.values()))
    else:
        copied, weights = run.world_size > 1, run.step.weights
        backward = run.fullest(
            gradients=lambda done: carried + (kept + bucket if done else 0),
            passing=lambda number: (
                w * weights[number].numel * (1 + (copied and weights[number].numel > size))
            ),
        )
    phases = [Phase(FORWARD_BACKWARD, device | backward, host)]
    largest = max(partitions)
    if not offloaded:
        step = {"gradients of the partition": touched, "flat fp32 gradient": FP32 * largest}
        phases.append(run.step_phase(device | step, [[largest]], host))
    if run.copies:
        copy = {"gloo's copy of gathered weights": w * run.world_size * largest}
        phases.append(Phase("gather of the weights", device | run.kept | copy, host))
    return EngineMemory(phases, owned=owned)


def zero3(run: PlannedRun, zero: Mapping[str, Any]) -> EngineMemory:
    """Memory under ZeRO-3, from the filled section ``zero_optimization``.

    A weight stays gathered from its forward to its backward where fewer than the reuse distance of elements lie
    between: that is so for the last half of that distance before the turn. What is fetched ahead comes on top.
    """
    w, weights = run.itemsize, run.step.weights
    slices = [-(-weight.numel // run.world_size) for weight in run.trained]
    owned = sum(slices)
    frozen = sum(-(-weight.nbytes // run.world_size) for weight in weights if weight.group is None)
    small = [w for w in weights if w.numel <= setting(zero, "stage3_param_persistence_threshold")]
    device, host = {"small weights, whole": nbytes(small)}, Rows()
    device["reduce bucket"] = w * run.written(setting(zero, "reduce_bucket_size"))
    # In fp32 as well: DeepSpeed's test for slices that could serve compares a torch.device with a string.
    optimizer = {"fp32 masters": FP32 * owned, "AdamW's moments": 2 * FP32 * owned}
    optimizer["gradient slices"] = w * owned
    (host if offloads(zero, "param") else device)["slices of the weights"] = w * owned + frozen
    if offloads(zero, "optimizer"):
        host |= optimizer | {"fp32 gradients": FP32 * owned}
    else:
        device |= optimizer

    large, biggest = numel(weights) - numel(small), max((weight.numel for weight in weights), default=0)
    ahead = setting(zero, "stage3_prefetch_bucket_size")
    near = min(large, max(setting(zero, "stage3_max_reuse_distance") // 2, ahead) + biggest)
    backward = run.fullest(
        gradients=lambda done: 0,
        passing=lambda number: w * weights[number].numel * (1 + run.copies),
        gathered=lambda done, _: w * min(near, max(large - done, 0)),
    )
    phases = [Phase(FORWARD_BACKWARD, device | backward, host)]
    if not offloads(zero, "optimizer"):
        most = setting(zero, "sub_group_size") + max(slices)  # a sub-group ends once it holds that many
        largest = min(most, max(map(sum, run.by_group(slices))))
        phases.append(run.step_phase(device | {"flat fp32 gradient": FP32 * largest}, [[largest]], host))
    return EngineMemory(phases, owned=owned)


def fsdp2(run: PlannedRun, *, reshards: bool) -> EngineMemory:
    """Memory under FSDP2, of the first rank, whose slices are the largest: parameters are cut by rows.

    ``reshards``: a block's gathered weights are freed after its forward.
    """
    weights, blocks, w = run.step.weights, run.step.blocks, run.itemsize
    slices = [-(-weight.rows // run.world_size) * (weight.numel // max(weight.rows, 1)) for weight in weights]
    own = [size for size, weight in zip(slices, weights, strict=True) if weight.group is not None]
    held = {"slices of the weights": FP32 * sum(slices), "AdamW's moments": 2 * FP32 * sum(own)}
    whole, trained = dict.fromkeys([REST, *blocks], 0), dict.fromkeys([REST, *blocks], 0)
    for block, weight in zip(blocks, weights, strict=True):
        whole[block] += weight.nbytes
        trained[block] += weight.numel if weight.group is not None else 0

    # In backward, block by block: one is whole, the buffer of the next is being filled. What lies in none is whole.
    order = [moment.parameter for moment in run.step.moments if moment.parameter is not None]
    last = {blocks[number]: number for number in order}  # whose gradient completes those of the block
    gathered, held_whole, buffer = {-1: whole[REST]}, 0, 0
    for number in reversed(order):
        if blocks[number] != REST and number == last[blocks[number]]:
            buffer = held_whole * (1 + run.copies)
            held_whole = whole[blocks[number]]
        in_blocks = held_whole if reshards else sum(whole.values()) - whole[REST]
        gathered[number] = whole[REST] + (in_blocks + buffer if held_whole else 0)
    summed = max(w + FP32, FP32 * (1 + run.copies))  # bytes of a gradient's element, copied in, then summed
    every, share = numel(run.trained), FP32 * sum(own)

    def passing(number: int) -> int:
        """A block is freed before its gradients are summed, all at once; what lies in none is not."""
        block = blocks[number]
        freed = 0 if block == REST else whole[block]
        return max(summed * trained[block] - freed, 0) if number == last[block] else 0

    backward = run.fullest(
        gradients=lambda done: share if run.accumulates else share * done // max(every, 1),
        passing=passing,
        gathered=lambda done, number: gathered[number],
    )
    step = run.step_phase(held | {"gradients": share}, run.by_group(own))
    return EngineMemory([Phase(FORWARD_BACKWARD, held | backward), step], owned=sum(own))


def numel(weights: Iterable[Weight]) -> int:
    """Elements of all of them."""
    return sum(weight.numel for weight in weights)


def nbytes(weights: Iterable[Weight]) -> int:
    """Bytes of all of them, as working weights."""
    return sum(weight.nbytes for weight in weights)


def adam_temporaries(groups: Sequence[Sequence[int]], *, on_cpu: bool) -> int:
    """Most bytes that one step of AdamW takes for itself.

    ``sqrt(v) / c + eps`` is made of two tensors on a CPU, where torch steps one parameter after another, and of
    one, changed in place, on a device, where it steps all parameters of a group together (``foreach``).

    Args:
        groups: elements of the tensors of each parameter group.
        on_cpu: whether they are on the host.
    """
    each = ((2 * max(sizes, default=0)) if on_cpu else sum(sizes) for sizes in groups)
    return FP32 * max(each, default=0)


def setting(zero: Mapping[str, Any], name: str) -> int:
    """Return an entry of ``zero_optimization``, or its default; stage 3's are known with and without prefix."""
    return int(zero.get(name, zero.get(name.removeprefix("stage3_"), DEFAULTS[name])))


def offloads(zero: Mapping[str, Any], part: str) -> bool:
    """Whether ``optimizer`` or ``param`` is kept on the host."""
    return (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"


def _touched(world_size: int, groups: Sequence[Sequence[int]], partitions: Sequence[int]) -> int:
    """Most elements of the parameters that a rank's partitions touch; ZeRO-1 and 2 keep their gradients whole."""
    change = [0] * (world_size + 1)
    for sizes, partition in zip(groups, partitions, strict=True):
        for size, end in zip(sizes, accumulate(sizes), strict=True):
            if size:
                change[(end - size) // partition] += size
                change[(end - 1) // partition + 1] -= size
    return max(accumulate(change))
