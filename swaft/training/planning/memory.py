"""Memory of one rank under each engine: published formulas, a named row for each buffer. Plain arithmetic.

W is the number of ranks, w the bytes per element of the working weights (2 in 16 bits, else 4), N the elements of
the model, T the trained ones, and P = T / W a rank's share. Read from the code of torch 2.13, accelerate 1.15 and
DeepSpeed 0.19.8.

| row | one process, DDP, stage 0 | ZeRO-1, ZeRO-2 | ZeRO-3 | FSDP2 |
|---|---|---|---|---|
| weights | w N | w N | w P | 4 P, the masters |
| fp32 masters | 4 T at stage 0 in 16 bits | 4 P | 4 P | |
| AdamW's moments | 8 T | 8 P | 8 P | 8 P |
| gradients | w T; DDP's buckets once more | w P, or of the largest weight; stage 1: w T first | w P | 4 P |
| reduce bucket | | its size; twice with `overlap_comm` | its size | |
| gradient on its way | | | | w + 4 of the largest block |
| gathered weights | | | within half the reuse distance | a block and what is in none |
| flat fp32 gradient | | 4 P | 4 of a sub-group | |

Forward and backward are counted at two moments: when backward begins, with all activations, and when it has ended,
with all gradients; ZeRO-1 and 2 also hold the gradients of accumulated micro-batches. The moments exist from the
first step on. Masters, moments and the fp32 gradients move to the host if the optimizer is offloaded, the slices
of the weights if parameters are. Terms of a few percent are left out: gloo's copies, one layer's gradients on
their way, and logits that live until the next micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from swaft.errors import ConfigError
from swaft.training.launch.accelerator import EngineSettings, partitions_at_load
from swaft.training.launch.fsdp2 import find_blocks
from swaft.training.launch.launcher import Launch

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP32 = 4
"""Bytes of a master weight, of its gradient and of each of AdamW's two moments."""
REST = 0
"""The number of the FSDP2 block for weights that are in no other block."""
ALLREDUCE_NUMEL = 500_000_000
"""Elements that DeepSpeed sums at a time at stage 0 (`MEMORY_OPT_ALLREDUCE_SIZE`)."""
FORWARD_BACKWARD = "forward and backward"
"""Name of the phase that holds activations."""
ALWAYS = "bes"
"""Moments of a step: (b) backward begins, (e) it has ended, (s) the optimizer steps."""


@dataclass(frozen=True)
class Weight:
    """One parameter of the model; a tied one counts once."""

    numel: int
    itemsize: int
    """Bytes of an element of the working weight."""
    rows: int = 1
    """Size of its first dimension."""
    trained: bool = True
    """Whether it is trained; else it is frozen."""
    block: int = REST
    """The block it is gathered with, under an engine that gathers blocks."""


class Row(NamedTuple):
    """A buffer, and when it exists."""

    name: str
    size: int
    """Bytes."""
    when: str = ALWAYS
    """Letters of the moments at which it exists."""
    on_host: bool = False
    """Whether it is in host memory; else on the rank's device."""


@dataclass(frozen=True)
class Phase:
    """Memory of one rank at the peak of a part of the run: bytes by name."""

    name: str
    device: Mapping[str, int]
    """On the rank's device; empty if the ranks compute on the host."""
    host: Mapping[str, int] = field(default_factory=dict)
    """In host memory."""

    @property
    def device_bytes(self) -> int:
        """Total on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Total in host memory."""
        return sum(self.host.values())


@dataclass
class PlannedRun:
    """The properties of a run that its memory depends on."""

    weights: Sequence[Weight]
    world_size: int
    on_cpu: bool
    """Whether the ranks compute on the host."""
    accumulates: bool = False
    """Whether several micro-batches make an optimizer step."""

    def __post_init__(self) -> None:
        self.trained = [weight for weight in self.weights if weight.trained]
        self.itemsize = max(weight.itemsize for weight in self.trained)
        """Bytes of an element of the working weights that are trained."""
        self.grown = ALWAYS if self.accumulates else "es"
        """When gradients exist that are summed over micro-batches."""

    def bucket(self, size: int) -> int:
        """Elements of a bucket that take memory: a host allocates no pages that are never written."""
        return min(size, numel(self.trained)) if self.on_cpu else size

    def adam(self, *sizes: int) -> Row:
        """Return the temporaries of one step of AdamW, on tensors with these numbers of elements.

        ``sqrt(v) / c + eps`` takes two tensors on a CPU, where torch steps one parameter after another, and one,
        changed in place, on a device, where it steps all parameters together (``foreach``).
        """
        return Row("AdamW's temporaries", FP32 * (2 * max(sizes) if self.on_cpu else sum(sizes)), "s")


def phases_of(rows: Sequence[Row], activations: int) -> list[Phase]:
    """Return forward and backward of a training step, and the optimizer's step if some row exists only then.

    Forward and backward are the larger of two moments: when backward begins, with all activations, and when it has
    ended, with all gradients.
    """

    def at(moment: str, name: str, **beside: int) -> Phase:
        here = [row for row in rows if moment in row.when]
        device = {row.name: row.size for row in here if not row.on_host}
        return Phase(name, device | beside, {row.name: row.size for row in here if row.on_host})

    begins, ends = at("b", FORWARD_BACKWARD, activations=activations), at("e", FORWARD_BACKWARD)
    phases = [max(begins, ends, key=lambda phase: phase.device_bytes)]
    if any(row.when == "s" for row in rows):
        phases.append(at("s", "optimizer step"))
    return phases


class PlannedEngine:
    """The engine that a launch line and a recipe's settings specify, and the memory it takes.

    Args:
        launch: the launch line.
        settings: the engine settings that result from that line, its files and the recipe.
        on_cpu: whether the ranks compute on the host; else on a GPU each.

    Raises:
        ConfigError: they ask for something that cannot be planned.
    """

    def __init__(self, launch: Launch, settings: EngineSettings, *, on_cpu: bool):
        self.launch, self.on_cpu = launch, on_cpu
        self.precision, self._fsdp2 = settings.precision, settings.fsdp2
        self.dtype = DTYPES[self.precision]
        casts = "weights" if launch.stage is not None or self._fsdp2 else "autocast"
        self.casting = "none" if self.precision == "no" else casts
        """How 16 bits are used: not at all, by autocast over fp32 weights, or by casting the weights beforehand."""
        self.loads_whole = True
        """Whether every rank loads the whole model into host memory before the engine takes it."""
        self._zero: Any = None
        if settings.deepspeed is None:
            return
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # imported here: takes seconds

        config, own = settings.deepspeed.config, {"no": "fp32"}.get(self.precision, self.precision)
        self.loads_whole = not partitions_at_load(launch.environ, config)
        zero = self._zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
        sums_in = (config.get("data_types") or {}).get("grad_accum_dtype") or own
        unknown = {
            "zero_optimization.zero_quantized_gradients": zero.zero_quantized_gradients,
            f"data_types.grad_accum_dtype = {sums_in}": sums_in != own,
            "zero_optimization.contiguous_gradients = false": not zero.contiguous_gradients,
        }
        problems = [
            f"the DeepSpeed configuration sets {name}, whose memory swaft plan does not know; leave it out, or "
            "train a few steps and measure their memory"
            for name, is_set in unknown.items()
            if is_set
        ]
        if problems:
            raise ConfigError(problems)

    def blocks(self, model: nn.Module) -> list[int]:
        """Return the block with which FSDP2 gathers each parameter, 0 for none; under other engines all 0."""
        blocks = find_blocks(model, self._fsdp2) if self._fsdp2 else []
        numbers = {id(each): number for number, block in enumerate(blocks, 1) for each in block.parameters()}
        return [numbers.get(id(parameter), REST) for parameter in model.parameters()]

    def offloads(self, part: Literal["optimizer", "param"]) -> bool:
        """Whether the fp32 masters (``optimizer``) or the slices of the weights (``param``) are in host memory."""
        return offloads(self._zero, part)

    def memory(
        self, weights: Sequence[Weight], activations: int, *, accumulates: bool
    ) -> tuple[list[Phase], int]:
        """Return the phases of the rank with the most memory, including the start, and the masters it updates."""
        stage, zero = self.launch.stage, self._zero
        run = PlannedRun(weights, self.launch.world_size, self.on_cpu, accumulates)
        if self._fsdp2 is not None:
            rows, owned = fsdp2(run, reshards=self._fsdp2.reshard_after_forward is not False)
        elif stage:
            rows, owned = zero3(run, zero) if stage == 3 else zero12(run, zero)
        else:
            rows, owned = replicated(run, deepspeed=stage == 0)
        loaded = {"model as loaded, fp32": FP32 * numel(weights)} if self.loads_whole else {}
        phases = phases_of(rows, activations)
        if self.on_cpu:
            phases = [Phase(phase.name, {}, {**phase.device, **phase.host}) for phase in phases]
        return [Phase("start", {}, loaded), *phases], owned


Rows = tuple[list[Row], int]
"""The rows of an engine, and the master elements that a rank updates and averages."""


def replicated(run: PlannedRun, *, deepspeed: bool) -> Rows:
    """Memory under one process or DDP, or (``deepspeed``) at stage 0."""
    trained, w = numel(run.trained), run.itemsize
    rows = [
        Row("weights", w * numel(run.weights)),
        Row("AdamW's moments", 2 * FP32 * trained),
        Row("gradients", w * trained, run.grown),
        run.adam(*(weight.numel for weight in run.trained)),
    ]
    if deepspeed and w != FP32:
        rows += [Row("fp32 masters", FP32 * trained), Row("gradients, fp32", FP32 * trained, "es")]
    if run.world_size > 1 and deepspeed:
        rows.append(Row("flat copy for the sum", w * min(trained, ALLREDUCE_NUMEL), "e"))
    elif run.world_size > 1:
        rows.append(Row("DDP's buckets", FP32 * trained))
    return rows, -(-trained // run.world_size)


def zero12(run: PlannedRun, zero: Any) -> Rows:
    """Memory under ZeRO-1 or ZeRO-2. Gradients are kept for every whole weight that the partition touches."""
    w, trained, offloaded = run.itemsize, numel(run.trained), offloads(zero, "optimizer")
    owned, largest = -(-trained // run.world_size), max(weight.numel for weight in run.trained)
    waits = zero.stage == 1 and not zero.overlap_comm  # for the last micro-batch to be summed
    bucket, kept = run.bucket(zero.reduce_bucket_size), w * max(owned, largest)
    rows = [
        Row("weights", w * numel(run.weights)),
        Row("fp32 masters", FP32 * owned, on_host=offloaded),
        Row("AdamW's moments", 2 * FP32 * owned, on_host=offloaded),
        Row("reduce bucket", w * (1 + bool(zero.overlap_comm)) * bucket, "be"[waits:]),
    ]
    if waits:
        rows.append(Row("gradients", w * trained, "e"))
    if offloaded:
        rows += [Row("offload buffer", w * largest), Row("its copy on the host", w * largest, on_host=True)]
        rows.append(Row("fp32 gradients", FP32 * owned, on_host=True))
        return [*rows, Row("staging of the weights", w * owned, on_host=True)], owned
    # Gradients of earlier micro-batches exist alongside those of the last.
    before, after = kept * run.accumulates, kept * (1 + run.accumulates)
    for size, when in ((before if waits else after, "b"), (after, "e"), (kept, "s")):
        rows.append(Row("gradients of the partition", size, when))
    return [*rows, Row("flat fp32 gradient", FP32 * owned, "s"), run.adam(owned)], owned


def zero3(run: PlannedRun, zero: Any) -> Rows:
    """Memory under ZeRO-3.

    A weight stays gathered from its forward to its backward if fewer elements than the reuse distance lie in
    between: this holds for the last half of that distance before backward begins. Prefetched weights come on top.
    """
    w, offloaded = run.itemsize, offloads(zero, "optimizer")
    slices = [-(-weight.numel // run.world_size) for weight in run.trained]
    cut, owned = -(-numel(run.weights) // run.world_size), sum(slices)
    ahead = max(zero.max_reuse_distance // 2, zero.prefetch_bucket_size)
    largest = max(weight.numel for weight in run.weights)
    rows = [
        Row("slices of the weights", w * cut, on_host=offloads(zero, "param")),
        # Even in fp32: DeepSpeed's test for slices it could reuse compares a torch.device with a string.
        Row("fp32 masters", FP32 * owned, on_host=offloaded),
        Row("AdamW's moments", 2 * FP32 * owned, on_host=offloaded),
        Row("gradient slices", w * owned, on_host=offloaded),
        Row("reduce bucket", w * run.bucket(zero.reduce_bucket_size)),
        Row("gathered weights", w * min(numel(run.weights), ahead + largest), "b"),
    ]
    if offloaded:
        return [*rows, Row("fp32 gradients", FP32 * owned, on_host=True)], owned
    flat = min(zero.sub_group_size + max(slices), owned)  # a sub-group ends once it is full
    return [*rows, Row("flat fp32 gradient", FP32 * flat, "s"), run.adam(flat)], owned


def fsdp2(run: PlannedRun, *, reshards: bool) -> Rows:
    """Memory of the first rank under FSDP2, whose slices are the largest: parameters are cut by rows.

    In backward one block is whole while the buffer of the next is being filled. It is freed before its gradients
    are copied and summed, all at once. Weights in no block are whole throughout; with ``reshards`` a block's
    gathered weights are freed after its forward.
    """
    weights, ranks = run.weights, run.world_size
    slices = [-(-weight.rows // ranks) * (weight.numel // max(weight.rows, 1)) for weight in weights]
    own = [size for size, weight in zip(slices, weights, strict=True) if weight.trained]
    whole, trained = Counter[int](), Counter[int]()
    for weight in weights:
        whole[weight.block] += weight.numel * run.itemsize
        trained[weight.block] += weight.numel * weight.trained
    rest, last = whole.pop(REST, 0), max(trained)
    gathered = rest + whole[last] + (whole[last] if reshards else whole.total())
    rows = [
        Row("slices of the weights", FP32 * sum(slices)),
        Row("AdamW's moments", 2 * FP32 * sum(own)),
        Row("gradients", FP32 * sum(own), run.grown),
        Row("gathered weights", gathered, "b"),
        Row("gathered weights", rest, "e"),
        # In the working format, and again in fp32 to be summed.
        Row("gradient on its way", (run.itemsize + FP32) * max(trained.values()), "e"),
        run.adam(*own),
    ]
    return rows, sum(own)


def numel(weights: Iterable[Weight]) -> int:
    """Return the total number of elements."""
    return sum(weight.numel for weight in weights)


def offloads(zero: Any, part: str) -> bool:
    """Whether ``optimizer`` or ``param`` is kept on the host, by section ``zero_optimization``, if any."""
    offload = getattr(zero, f"offload_{part}", None)
    return offload is not None and offload.device != "none"
