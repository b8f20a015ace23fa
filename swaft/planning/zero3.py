"""Memory of DeepSpeed ZeRO stage 3, read in DeepSpeed 0.19.8 (`stage3.py`, `partitioned_param_coordinator.py`).

With W ranks, w bytes an element (2 in 16 bits, 4 in fp32), P the elements of a rank's slices of all trained
parameters (each padded to a multiple of W):

| term | bytes | where it comes from |
|---|---|---|
| slices of the weights | w P | `lp_param_buffer`; and of the frozen ones |
| masters | 4 P | `fp32_partitioned_groups_flat`, in fp32 too |
| moments | 8 P | AdamW's two, from the first step on |
| gradient slices | w P | `grad_partitions_flat_buffer`, always there |
| reduce bucket | w reduce_bucket_size | `IPGBucket.buffer`, always there |
| small weights | w n each | those up to `stage3_param_persistence_threshold` stay whole |
| gathered weights | w n each | from first use to the last that is near, and fetched ahead (see `gathered.py`) |
| copy for the sum | w of what is summed | `reduce_scatter_coalesced` orders slices; one that divides needs none |
| gradients on their way | w n | one that does not fit into the bucket waits outside |
| flat gradient | w P + 4 P | `step`: of one sub-group (`sub_group_size`) after another |
| gloo's copies | w of what is gathered or summed | gloo flattens what it gathers, copies what it scatters |

"Near" is within `stage3_max_reuse_distance`, a billion elements by default: a smaller model is whole on every rank
when its forward has ended.

Offloading the optimizer puts masters, moments and gradients (w P, and 4 P in fp32) on the host; offloading the
parameters the slices of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swaft.planning.gathered import GatheredWeights, Gathering
from swaft.planning.memory import FP32, EngineMemory, Phase, Run, adam_temporaries
from swaft.planning.trace import Moment
from swaft.planning.zero12 import REDUCE_BUCKET_SIZE

SUB_GROUP_SIZE = 1_000_000_000
PREFETCH_BUCKET_SIZE = 50_000_000
PERSISTENCE_THRESHOLD = 100_000
MAX_REUSE_DISTANCE = MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's defaults, in elements."""


def zero3_memory(run: Run, moments: Sequence[Moment], zero: Mapping[str, Any]) -> EngineMemory:
    """Return what a rank holds under ZeRO-3.

    Args:
        run: how the model is trained.
        moments: of one micro-batch.
        zero: section ``zero_optimization`` of the filled configuration.
    """
    itemsize = max(weight.itemsize for weight in run.weights if weight.group is not None)
    slices = [-(-weight.numel // run.world_size) for weight in run.weights]
    own = [numel for numel, weight in zip(slices, run.weights, strict=True) if weight.group is not None]
    owned = sum(own)
    frozen = [w.itemsize * n for n, w in zip(slices, run.weights, strict=True) if w.group is None]
    small = _number(zero, "stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
    persistent = frozenset(i for i, weight in enumerate(run.weights) if weight.numel <= small)
    bucket_size = _number(zero, "reduce_bucket_size", REDUCE_BUCKET_SIZE)

    parameters = {"slices of the weights": itemsize * owned + sum(frozen)}
    # In fp32 as well: the test for slices that could serve compares a torch.device with a string.
    optimizer = {"fp32 masters": FP32 * owned, "AdamW's moments": 2 * FP32 * owned}
    gradients = {"gradient slices": itemsize * owned}
    device: dict[str, int] = {
        "small weights, whole": sum(run.weights[i].nbytes for i in persistent),
        # On the host, pages that are never written to take no memory.
        "reduce bucket": itemsize * (min(bucket_size, run.trainable) if run.on_cpu else bucket_size),
    }
    host: dict[str, int] = {}
    (host if _offloaded(zero, "param") else device).update(parameters)
    if _offloaded(zero, "optimizer"):
        host |= optimizer | gradients | {"fp32 gradients": FP32 * owned}
    else:
        device |= optimizer | gradients

    gathering = Gathering(
        prefetch_numel=_number(zero, "stage3_prefetch_bucket_size", PREFETCH_BUCKET_SIZE),
        max_live_numel=_number(zero, "stage3_max_live_parameters", MAX_LIVE_PARAMETERS),
        max_reuse_numel=_number(zero, "stage3_max_reuse_distance", MAX_REUSE_DISTANCE),
        persistent=persistent,
    )
    # For two steps DeepSpeed learns the order.
    backward = max(
        (_backward(run, moments, bucket_size, gathering, learnt=learnt) for learnt in (False, True)),
        key=lambda rows: sum(rows.values()),
    )
    phases = [Phase("forward and backward", device | backward, host)]
    if not _offloaded(zero, "optimizer"):
        step = {"kept of the last micro-batch": run.kept_bytes} | _step(run, zero, slices, itemsize)
        phases.append(Phase("optimizer step", device | step, host))
    return EngineMemory(phases, owned=owned)


def sub_groups(numels: Sequence[int], size: int) -> list[list[int]]:
    """Cut a group's slices into sub-groups as `_create_fp16_sub_groups` does: each as soon as it is full."""
    groups: list[list[int]] = [[]]
    for numel in numels:
        groups[-1].append(numel)
        if sum(groups[-1]) >= size:
            groups.append([])
    return [group for group in groups if group]


def _step(run: Run, zero: Mapping[str, Any], slices: Sequence[int], itemsize: int) -> dict[str, int]:
    """Return the rows of the optimizer step of the largest sub-group."""
    size = _number(zero, "sub_group_size", SUB_GROUP_SIZE)
    largest = max(
        sum(sub_group)
        for group in run.groups
        for sub_group in sub_groups(
            [n for n, weight in zip(slices, run.weights, strict=True) if weight.group == group], size
        )
    )
    temporaries = adam_temporaries([largest], on_cpu=run.on_cpu)
    casting = itemsize * largest if itemsize != FP32 else 0
    return {"flat fp32 gradient": FP32 * largest, "AdamW's temporaries": max(temporaries, casting)}


def _backward(
    run: Run, moments: Sequence[Moment], bucket_size: int, gathering: Gathering, *, learnt: bool
) -> dict[str, int]:
    """Return the rows of the fullest moment of forward and backward."""
    weights = GatheredWeights(run, moments, gathering, learnt=learnt)
    fullest: dict[str, int] = {}
    elements, waiting, outside = 0, list[int](), 0

    def look(activations: int, *, gathered: int, gradient: int = 0, copy: int = 0) -> None:
        nonlocal fullest
        rows = {
            "activations": activations,
            "gathered weights": gathered,
            "gradients on their way": outside + gradient,
            "copies for the exchange": copy,
        }
        fullest = max(fullest, rows, key=lambda each: sum(each.values()))

    def reduce(live: int, gradient: int) -> None:
        nonlocal elements, waiting, outside
        summed = [run.weights[number] for number in waiting]
        nbytes = sum(weight.nbytes for weight in summed)
        in_place = len(summed) == 1 and summed[0].numel % run.world_size == 0
        copy = (0 if in_place else nbytes) + (nbytes if run.on_cpu and run.world_size > 1 else 0)
        look(live, gathered=weights.held, gradient=gradient, copy=copy)
        elements, waiting, outside = 0, [], 0

    for position, moment in enumerate(moments):
        look(moment.peak_bytes, gathered=weights.held)
        if moment.kind == "enter":
            most, exchanged = weights.enter(position)
            look(moment.live_bytes, gathered=most, copy=exchanged if run.on_cpu else 0)
        elif moment.kind == "leave":
            weights.leave(position)
        elif moment.kind == "gradient":
            (number,) = moment.parameters
            weight = run.weights[number]
            if elements + weight.numel > bucket_size and elements:
                reduce(moment.live_bytes, weight.nbytes)
            look(moment.live_bytes, gathered=weights.held, gradient=weight.nbytes)
            waiting.append(number)
            if elements + weight.numel > bucket_size:
                outside += weight.nbytes
            elements += weight.numel
    if waiting:
        reduce(moments[-1].live_bytes, 0)
    return fullest


def _number(zero: Mapping[str, Any], name: str, default: int) -> int:
    """Return an entry; DeepSpeed knows those of stage 3 with and without their prefix."""
    return int(zero.get(name, zero.get(name.removeprefix("stage3_"), default)))


def _offloaded(zero: Mapping[str, Any], part: str) -> bool:
    return (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
