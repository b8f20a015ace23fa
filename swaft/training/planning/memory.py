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

from collections.abc import Callable, Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class Phase:
    """Memory of one rank at the fullest moment of a part of the run, by name."""

    name: str
    device: Mapping[str, int]
    """Bytes on the rank's device; on a CPU that is the host."""
    host: Mapping[str, int] = field(default_factory=dict)
    """Bytes in host memory."""

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
class Run:
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
        passing: Callable[[Weight], int] = lambda weight: 0,
        gathered: Callable[[int], int] = lambda done: 0,
    ) -> dict[str, int]:
        """Return the rows of the fullest moment of forward and backward.

        Args:
            gradients: bytes held of gradients once this many elements have theirs.
            passing: bytes that a gradient takes beside that while it is handed over.
            gathered: bytes of weights gathered once this many elements have their gradients.
        """
        fullest: dict[str, int] = {}

        def look(activations: int, extra: int, weights: int, handed_over: int) -> None:
            nonlocal fullest
            rows = {
                "activations": activations,
                "gathered weights": weights,
                "gradients": extra,
                "gradients handed over": handed_over,
            }
            fullest = max(fullest, rows, key=lambda each: sum(each.values()))

        done = 0
        for moment in self.step.moments:
            look(moment.peak_bytes, gradients(done), gathered(done), 0)
            if moment.parameter is not None:
                weight = self.step.weights[moment.parameter]
                done += weight.numel
                look(moment.live_bytes, gradients(done), gathered(done), passing(weight))
        return fullest


def replicated(run: Run, *, deepspeed: bool) -> EngineMemory:
    """Memory under one process or DDP, or (``deepspeed``) at stage 0."""
    trained, w = numel(run.trained), run.itemsize
    held = {"weights": nbytes(run.step.weights), "AdamW's moments": 2 * FP32 * trained}
    if deepspeed and w != FP32:
        held["fp32 masters"] = FP32 * trained
    if not deepspeed and run.world_size > 1:
        held["DDP's buckets"] = FP32 * trained
    backward = run.fullest(gradients=lambda done: w * (trained if run.accumulates else done))
    step = held | {"gradients": w * trained, "kept of the last micro-batch": run.step.kept_bytes}
    if "fp32 masters" in held:
        step["gradients, fp32"] = FP32 * trained
    groups = run.by_group(weight.numel for weight in run.trained)
    phases = [
        Phase("forward and backward", held | backward),
        Phase("optimizer step", step | {"AdamW's temporaries": adam_temporaries(groups, on_cpu=run.on_cpu)}),
    ]
    if deepspeed and run.world_size > 1:
        copy = w * min(trained, ALLREDUCE_NUMEL)
        phases.insert(1, Phase("sum of gradients", step | {"flat copy for the sum": copy}))
    return EngineMemory(phases, owned=-(-trained // run.world_size))


def zero12(run: Run, zero: Mapping[str, Any]) -> EngineMemory:
    """Memory under ZeRO-1 or ZeRO-2, from the filled section ``zero_optimization``."""
    w, trained = run.itemsize, numel(run.trained)
    unit = 2 * run.world_size  # partitions are aligned to two elements
    partitions = [
        -(-sum(sizes) // unit) * 2 for sizes in run.by_group(weight.numel for weight in run.trained)
    ]
    owned, touched = sum(partitions), _touched(run, partitions)
    offloaded = offloads(zero, "optimizer")
    optimizer = {"fp32 masters": FP32 * owned, "AdamW's moments": 2 * FP32 * owned}
    frozen = nbytes(run.step.weights) - nbytes(run.trained)
    device, host = {"weights": frozen + w * owned * run.world_size}, dict[str, int]()
    if offloaded:
        largest = max(weight.nbytes for weight in run.trained)
        device["offload buffer"] = largest
        host = optimizer | {
            "fp32 gradients": FP32 * owned,
            "staging of the weights": w * owned,
            "offload buffer": largest,
        }
    else:
        device |= optimizer

    overlaps = bool(zero.get("overlap_comm"))
    size = setting(zero, "reduce_bucket_size")
    bucket = (
        w * (1 + overlaps) * (min(size, trained) if run.on_cpu else size)
    )  # a host has no untouched pages
    kept = 0 if offloaded else w * touched
    carried = kept if run.accumulates else 0
    if (
        zero.get("stage") == 1 and not overlaps
    ):  # all gradients wait for the last micro-batch, then are summed
        backward = run.fullest(gradients=lambda done: carried + w * done)
        summed = {"gradients": w * trained + kept + carried, "reduce bucket": bucket}
        backward = max(backward, summed, key=lambda rows: sum(rows.values()))
    else:
        backward = run.fullest(
            gradients=lambda done: carried + (kept + bucket if done else 0),
            passing=lambda weight: (
                w * weight.numel * (2 if weight.numel > size and run.world_size > 1 else 1)
            ),
        )
    last = device | {"kept of the last micro-batch": run.step.kept_bytes}
    phases = [Phase("forward and backward", device | backward, host)]
    if not offloaded:
        largest = max(partitions)
        step = {
            "gradients of the partition": w * touched,
            "flat fp32 gradient": FP32 * largest,
            "AdamW's temporaries": adam_temporaries([[largest]], on_cpu=run.on_cpu),
        }
        phases.append(Phase("optimizer step", last | step, host))
    if run.copies:
        copy = {"gloo's copy of gathered weights": w * run.world_size * max(partitions)}
        phases.append(Phase("gather of the weights", last | copy, host))
    return EngineMemory(phases, owned=owned)


def zero3(run: Run, zero: Mapping[str, Any]) -> EngineMemory:
    """Memory under ZeRO-3, from the filled section ``zero_optimization``.

    A weight stays gathered from its forward to its backward where fewer than the reuse distance of elements lie
    between: that is so for the last half of that distance before the turn. What is fetched ahead comes on top.
    """
    w, weights = run.itemsize, run.step.weights
    slices = [-(-weight.numel // run.world_size) for weight in run.trained]
    owned = sum(slices)
    frozen = sum(-(-weight.nbytes // run.world_size) for weight in weights if weight.group is None)
    small = [w for w in weights if w.numel <= setting(zero, "stage3_param_persistence_threshold")]
    bucket_size = setting(zero, "reduce_bucket_size")
    device = {
        "small weights, whole": nbytes(small),
        "reduce bucket": w * (min(bucket_size, numel(run.trained)) if run.on_cpu else bucket_size),
    }
    host: dict[str, int] = {}
    # In fp32 as well: DeepSpeed's test for slices that could serve compares a torch.device with a string.
    optimizer = {"fp32 masters": FP32 * owned, "AdamW's moments": 2 * FP32 * owned}
    gradient_slices = {"gradient slices": w * owned}
    (host if offloads(zero, "param") else device).update({"slices of the weights": w * owned + frozen})
    if offloads(zero, "optimizer"):
        host |= optimizer | gradient_slices | {"fp32 gradients": FP32 * owned}
    else:
        device |= optimizer | gradient_slices

    large = numel(weights) - numel(small)
    biggest = max((weight.numel for weight in weights), default=0)
    near = setting(zero, "stage3_max_reuse_distance") // 2 + biggest
    near = min(large, max(near, setting(zero, "stage3_prefetch_bucket_size") + biggest))
    backward = run.fullest(
        gradients=lambda done: 0,
        passing=lambda weight: w * weight.numel * (1 + run.copies),
        gathered=lambda done: w * min(near, max(large - done, 0)),
    )
    phases = [Phase("forward and backward", device | backward, host)]
    if not offloads(zero, "optimizer"):
        groups = [sub_groups(sizes, setting(zero, "sub_group_size")) for sizes in run.by_group(slices)]
        largest = max(sum(sub_group) for group in groups for sub_group in group)
        step = {
            "kept of the last micro-batch": run.step.kept_bytes,
            "flat fp32 gradient": FP32 * largest,
            "AdamW's temporaries": adam_temporaries([[largest]], on_cpu=run.on_cpu),
        }
        phases.append(Phase("optimizer step", device | step, host))
    return EngineMemory(phases, owned=owned)


def fsdp2(run: Run, *, reshards: bool) -> EngineMemory:
    """Memory under FSDP2, of the first rank, whose slices are the largest: parameters are cut by rows.

    ``reshards``: a block's gathered weights are freed after its forward.
    """
    weights, blocks = run.step.weights, run.step.blocks
    slices = [-(-weight.rows // run.world_size) * (weight.numel // max(weight.rows, 1)) for weight in weights]
    own = [size for size, weight in zip(slices, weights, strict=True) if weight.group is not None]
    held = {"slices of the weights": FP32 * sum(slices), "AdamW's moments": 2 * FP32 * sum(own)}
    gathered, trained = dict.fromkeys([REST, *blocks], 0), dict.fromkeys([REST, *blocks], 0)
    for block, weight in zip(blocks, weights, strict=True):
        gathered[block] += weight.nbytes
        trained[block] += weight.numel if weight.group is not None else 0
    rest, inner = gathered.pop(REST), max(gathered.values(), default=0)
    whole = sum(gathered.values())
    rest_numel, block_numel = trained.pop(REST), max(trained.values(), default=0)
    w, every = run.itemsize, numel(run.trained)
    buffer = inner * (1 + run.copies)  # a block end to end, copied out of it
    summed = w * block_numel + FP32 * block_numel * (1 + run.copies)
    at_end = w * rest_numel + FP32 * rest_numel * (1 + run.copies)
    share = FP32 * sum(own)
    backward = run.fullest(
        gradients=lambda done: (
            (share if run.accumulates else share * done // max(every, 1))
            + (0 if not done else at_end if done == every else summed)
        ),
        gathered=lambda done: rest + (buffer + (inner if reshards else whole) if done < every else 0),
    )
    step = {
        "gradients": share,
        "kept of the last micro-batch": run.step.kept_bytes,
        "AdamW's temporaries": adam_temporaries(run.by_group(own), on_cpu=run.on_cpu),
    }
    phases = [Phase("forward and backward", held | backward), Phase("optimizer step", held | step)]
    return EngineMemory(phases, owned=sum(own))


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


def sub_groups(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Cut slices into the sub-groups that ZeRO-3 steps one after another; each ends once it holds ``most``."""
    found: list[list[int]] = [[]]
    for size in sizes:
        if sum(found[-1]) >= most:
            found.append([])
        found[-1].append(size)
    return found


def setting(zero: Mapping[str, Any], name: str) -> int:
    """Return an entry of ``zero_optimization``, or its default; stage 3's are known with and without prefix."""
    return int(zero.get(name, zero.get(name.removeprefix("stage3_"), DEFAULTS[name])))


def offloads(zero: Mapping[str, Any], part: str) -> bool:
    """Whether ``optimizer`` or ``param`` is kept on the host."""
    return (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"


def _touched(run: Run, partitions: Sequence[int]) -> int:
    """Most elements of the parameters that a rank's partitions touch; ZeRO-1 and 2 keep their gradients whole."""
    change = [0] * (run.world_size + 1)
    groups = run.by_group(weight.numel for weight in run.trained)
    for sizes, partition in zip(groups, partitions, strict=True):
        for size, end in zip(sizes, accumulate(sizes), strict=True):
            if size:
                change[(end - size) // partition] += size
                change[(end - 1) // partition + 1] -= size
    return max(accumulate(change))
