"""Memory of FSDP2: every parameter cut by rows, and blocks of them gathered while they compute.

With W ranks, c bytes an element in the format that is computed in, N all elements, T the trained ones, n those of
one block:

| term | bytes | where it comes from |
|---|---|---|
| slices of the weights | 4 N / W | fp32, the masters themselves; rows are padded to a multiple of W |
| moments | 8 T / W | AdamW's two, from the first step on |
| gradient slices | 4 T / W | as backward makes them; from the start where they accumulate |
| gathered weights | c n | of the block that computes; what lies in no block stays until backward has ended |
| buffer of the gather | c n | a block end to end (`foreach_all_gather`), copied out of it |
| gradients on their way | c n | of the block that computes |
| buffer of the sum | 4 n | `foreach_reduce`, in fp32, kept until the next block's |
| gloo's copy | as the larger buffer | gloo flattens what it gathers and copies what it scatters; NCCL does not |
| AdamW's temporaries | | see `adam_temporaries` |
"""

from __future__ import annotations

from collections.abc import Sequence

from swaft.planning.memory import FP32, EngineMemory, Phase, Run, adam_temporaries
from swaft.planning.trace import Moment

REST = 0
"""The number of the block that holds what lies in no other."""


def sharded_memory(
    run: Run, moments: Sequence[Moment], blocks: Sequence[int], *, reshards: bool
) -> EngineMemory:
    """Return what the first rank holds under FSDP2; its slices are the largest.

    Args:
        run: how the model is trained.
        moments: of one micro-batch.
        blocks: the block of each parameter; `REST` for those in none.
        reshards: whether a block's gathered weights are let go after its forward.
    """
    slices = [
        -(-weight.rows // run.world_size) * (weight.numel // max(weight.rows, 1)) for weight in run.weights
    ]
    trained = [n for n, weight in zip(slices, run.weights, strict=True) if weight.group is not None]
    owned = sum(trained)
    held = {"slices of the weights": FP32 * sum(slices), "AdamW's moments": 2 * FP32 * owned}
    by_group = [
        [n for n, weight in zip(slices, run.weights, strict=True) if weight.group == group]
        for group in run.groups
    ]
    temporaries = max((adam_temporaries(numels, on_cpu=run.on_cpu) for numels in by_group), default=0)
    step = {
        "gradient slices": FP32 * owned,
        "kept of the last micro-batch": run.kept_bytes,
        "AdamW's temporaries": temporaries,
    }
    backward = _backward(run, moments, slices, blocks, reshards=reshards)
    phases = [Phase("forward and backward", held | backward), Phase("optimizer step", held | step)]
    return EngineMemory(phases, owned=owned)


def _backward(
    run: Run, moments: Sequence[Moment], slices: Sequence[int], blocks: Sequence[int], *, reshards: bool
) -> dict[str, int]:
    """Return the rows of the fullest moment of forward and backward."""
    numel = dict.fromkeys(blocks, 0)
    working = dict.fromkeys(blocks, 0)
    missing = dict.fromkeys(blocks, 0)
    for block, weight in zip(blocks, run.weights, strict=True):
        numel[block] += weight.numel if weight.group is not None else 0
        working[block] += weight.nbytes
        missing[block] += weight.group is not None
    accumulates = run.accumulation_steps > 1
    sharded = FP32 * sum(n for n, w in zip(slices, run.weights, strict=True) if w.group) if accumulates else 0
    gathered: set[int] = set()
    current, summed, waiting, fullest = REST, 0, 0, dict[str, int]()

    def look(activations: int, *, summing: int = 0) -> None:
        nonlocal fullest
        buffer = working[current] if current in gathered else 0
        rows = {
            "activations": activations,
            "gathered weights": sum(working[block] for block in gathered),
            "buffer of the gather": buffer,
            "gradient slices": sharded,
            "gradients on their way": waiting,
            "buffer of the sum": max(summed, summing),
            "gloo's copy": max(buffer, summing) if run.on_cpu and run.world_size > 1 else 0,
        }
        fullest = max(fullest, rows, key=lambda each: sum(each.values()))

    for moment in moments:
        look(moment.peak_bytes)
        if moment.kind == "enter":
            entered = blocks[moment.parameters[0]]
            if entered != current and reshards:
                gathered -= {current} - {REST}
            current = entered
            gathered.add(current)
            look(moment.live_bytes)
        elif moment.kind == "gradient":
            (number,) = moment.parameters
            block, weight = blocks[number], run.weights[number]
            waiting += weight.nbytes
            missing[block] -= 1
            if not missing[block]:
                look(moment.live_bytes, summing=FP32 * numel[block])
                gathered.discard(block)
                waiting -= sum(
                    w.nbytes
                    for b, w in zip(blocks, run.weights, strict=True)
                    if b == block and w.group is not None
                )
                summed = FP32 * numel[block]
                sharded += 0 if accumulates else FP32 * -(-numel[block] // run.world_size)
    return fullest
