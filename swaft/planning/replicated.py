"""Memory of the engines that keep the whole model on every rank: one process, DDP, and DeepSpeed stage 0.

| term | bytes | where it comes from |
|---|---|---|
| weights | 4 N | the parameters, fp32; under DeepSpeed in 16 bits 2 N |
| masters | 4 T | DeepSpeed in 16 bits (`FP16_UnfusedOptimizer`); else the weights themselves |
| moments | 8 T | AdamW's two, from the first step on |
| gradients | 4 T | ``parameter.grad``, until the step has ended; from the start where they accumulate |
| DDP's buckets | 4 T | copies that are summed; accelerate leaves ``gradient_as_bucket_view`` off |
| DeepSpeed's copy for the sum | up to 2 GB | `buffered_allreduce_fallback`, 500 million elements at a time |
| AdamW's temporaries | | see `adam_temporaries` |

with N all elements, T the trained ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from swaft.planning.memory import FP32, EngineMemory, Phase, Run, adam_temporaries
from swaft.planning.trace import Moment

ALLREDUCE_NUMEL = 500_000_000
"""Elements that DeepSpeed sums at a time at stage 0 (`engine.py`, `MEMORY_OPT_ALLREDUCE_SIZE`)."""


def replicated_memory(run: Run, moments: Sequence[Moment], *, deepspeed: bool) -> EngineMemory:
    """Return what a rank holds under one process, DDP or DeepSpeed stage 0.

    Args:
        run: how the model is trained.
        moments: of one micro-batch.
        deepspeed: stage 0; else one process, or DDP where there are more ranks.
    """
    held = {"weights": run.working_bytes, "AdamW's moments": 2 * FP32 * run.trainable}
    itemsize = {weight.itemsize for weight in run.weights if weight.group is not None}
    if deepspeed and itemsize != {FP32}:
        held["fp32 masters"] = FP32 * run.trainable
    if not deepspeed and run.world_size > 1:
        held["DDP's buckets"] = FP32 * run.trainable
    gradient_bytes = sum(weight.nbytes for weight in run.weights if weight.group is not None)
    activations, gradients = _fullest(run, moments, gradient_bytes)
    backward = held | {"activations": activations, "gradients": gradients}
    step = held | {"gradients": gradient_bytes, "kept of the last micro-batch": run.kept_bytes}
    if "fp32 masters" in held:
        step["gradients, fp32"] = FP32 * run.trainable
    by_group = [[w.numel for w in run.weights if w.group == group] for group in run.groups]
    temporaries = max((adam_temporaries(numels, on_cpu=run.on_cpu) for numels in by_group), default=0)
    phases = [
        Phase("forward and backward", backward),
        Phase("optimizer step", step | {"AdamW's temporaries": temporaries}),
    ]
    if deepspeed and run.world_size > 1:
        copy = min(gradient_bytes, ALLREDUCE_NUMEL * max(itemsize, default=0))
        phases.insert(1, Phase("sum of gradients", step | {"flat copy for the sum": copy}))
    return EngineMemory(phases, owned=-(-run.trainable // run.world_size))


def _fullest(run: Run, moments: Sequence[Moment], all_gradients: int) -> tuple[int, int]:
    """Return activations and gradients at the moment when both together take most."""
    accumulates = run.accumulation_steps > 1
    held = all_gradients if accumulates else 0
    fullest = (0, 0)
    for moment in moments:
        fullest = max(fullest, (moment.peak_bytes, held), key=sum)
        if moment.kind == "gradient" and not accumulates:
            held += sum(run.weights[i].nbytes for i in moment.parameters)
    return fullest
