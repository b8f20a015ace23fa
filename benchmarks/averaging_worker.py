"""One rank of the CPU measurements of an averaging event (`benchmarks.averaging_event` starts it).

Trains one model under DDP, ZeRO-2 and ZeRO-3 in turn, each with the averages that other libraries offer there, and
writes what all ranks found.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

import swaft
from benchmarks.averaging_training import (
    DECAY,
    STEP,
    SWAFT,
    Blocks,
    Other,
    SwitchedSWA,
    Training,
    bert,
    event_rounds,
    paired_blocks,
    ratio_of,
    times_of,
    timm_average,
    torch_average,
)
from benchmarks.measuring import spread

GATHER = "gather, then average on rank 0"
TORCH, TORCH_FOREACH, TIMM = "torch AveragedModel", "torch AveragedModel, foreach", "timm's form of EMA, fp32"
EMPTY = "under ZeRO-3 every parameter of the module is an empty placeholder: nothing would be averaged"
WHOLE = "under DDP every rank holds the whole weights: there is nothing to gather"
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "gather", "reduce", "reduce_scatter_tensor",
    "all_to_all", "send", "recv",
)  # fmt: skip


@dataclass
class Traffic:
    """Collectives this rank has taken part in."""

    calls: int = 0
    nbytes: int = 0
    """Bytes of the tensors that they fill, or sum in place."""


def main() -> None:
    """Measure under every engine; rank 0 writes the findings."""
    settings, results = json.loads(sys.argv[1]), Path(sys.argv[2])
    traffic = count_collectives()
    dist.init_process_group("gloo")
    findings = {}
    for engine in settings["engines"]:
        findings[engine] = measure(engine, settings, traffic)
        gc.collect()
    if dist.get_rank() == 0:
        results.write_text(json.dumps(findings))
    dist.barrier()
    dist.destroy_process_group()


def measure(engine: str, settings: dict, traffic: Traffic) -> dict[str, object]:
    """The figures of one engine, the same on every rank."""
    model = bert(settings["model"])
    numel = sum(parameter.numel() for parameter in model.parameters())
    training, others, missing = build(engine, model, settings["batch"])
    forecast = training.averager.forecast()
    mine = event_rounds(training, others, rounds=settings["rounds"], together=dist.barrier)
    seconds = {name: slowest(values) for name, values in mine.items()}
    calls = collectives(training, others, traffic)
    blocks = paired_blocks(training, pairs=settings["pairs"], steps=settings["steps"])
    blocks = Blocks(
        blocks.steps,
        averaged=slowest(blocks.averaged),
        bare=slowest(blocks.bare),
        blocking=slowest(blocks.blocking),
        waits=max(_gather(blocks.waits)),
    )
    step_s = statistics.median(seconds[STEP])
    arms: dict[str, object] = {
        SWAFT: times_of(seconds[SWAFT], step_s=step_s, blocking=blocks.blocking)
        | calls[SWAFT]
        | {
            "waits": blocks.waits,
            "host_bytes": over_ranks(forecast.host_bytes + forecast.pinned_bytes),
            "copied_bytes": over_ranks(forecast.copied_bytes),
        }
    }
    for name, other in others.items():
        arms[name] = (
            times_of(seconds[name], step_s=step_s)
            | calls[name]
            | {
                "waits": 1,
                "host_bytes": over_ranks(other.nbytes),
                "copied_bytes": over_ranks(4 * numel if name == GATHER else 0),
            }
        )
    training.averager.close()
    return {
        "elements": numel,
        "batch of a rank": settings["batch"],
        "threads of torch": torch.get_num_threads(),
        "threads of swaft": forecast.threads,
        "training step s": spread(seconds[STEP]),
        "device bytes": "none: there is no device",
        "averages": arms | {name: {"skipped": reason} for name, reason in missing.items()},
        "paired steps": ratio_of(blocks),
    }


def build(
    engine: str, model: Any, batch_shape: list[int]
) -> tuple[Training, dict[str, Other], dict[str, str]]:
    """The model under an engine, the averages that others offer there, and why the rest offer none."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    batch = {
        "input_ids": torch.randint(0, model.config.vocab_size, batch_shape, generator=generator),
        "labels": torch.randint(0, 2, batch_shape[:1], generator=generator),
    }
    others: dict[str, Other] = {}
    missing: dict[str, str] = {}
    if engine == "zero3":
        missing = dict.fromkeys((TORCH, TORCH_FOREACH, TIMM), EMPTY)
    else:  # made before DeepSpeed ties the parameters to itself
        others[TORCH] = torch_average(model)
        others[TORCH_FOREACH] = torch_average(model, multi_avg_fn=get_swa_multi_avg_fn())
        others[TIMM] = timm_average(model)
    if engine == "ddp":
        trained: Any = nn.parallel.DistributedDataParallel(model)
        missing[GATHER] = WHOLE

        def step() -> None:
            trained(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": batch_shape[0],
            "zero_optimization": {"stage": int(engine[-1])},
            "zero_force_ds_cpu_optimizer": False,
        }
        trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        others[GATHER] = gathered_average(model, stage=int(engine[-1]))

        def step() -> None:
            trained.backward(trained(**batch).loss)
            trained.step()

    trained.train()
    rule = SwitchedSWA()
    averager = swaft.WeightAverager(trained, optimizer, rule=rule, total_steps=100_000)
    averager.wait()
    rule.switch.on = False
    return Training(step, averager, rule.switch), others, missing


def gathered_average(model: nn.Module, *, stage: int) -> Other:
    """Gather every master whole on every rank at every event; rank 0 keeps the average.

    ZeRO-3: all parameters at once, as TRL does for its reference model (in fp32 the parameters are the masters'
    values). ZeRO-2: one parameter after another.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = list(model.parameters())
    average: list[torch.Tensor] = []

    def take(position: int, weights: torch.Tensor) -> None:
        if dist.get_rank() != 0:
            return
        if position == len(average):
            average.append(weights.detach().clone())
        average[position].lerp_(weights.detach(), 1.0 - DECAY)

    def update() -> None:
        if stage == 3:
            with deepspeed.zero.GatheredParameters(parameters):
                for i, parameter in enumerate(parameters):
                    take(i, parameter)
        else:
            for i, parameter in enumerate(parameters):
                weights = safe_get_full_fp32_param(parameter)
                assert weights is not None, "DeepSpeed knows no master of this parameter"
                take(i, weights)

    update()
    return Other(update, sum(tensor.nbytes for tensor in average))


def collectives(training: Training, others: dict[str, Other], traffic: Traffic) -> dict[str, dict[str, int]]:
    """Collectives that one event of each average takes, and the bytes they fill."""
    training.step()
    counts = {}
    for name, call in {
        SWAFT: training.event,
        **{name: other.update for name, other in others.items()},
    }.items():
        calls, nbytes = traffic.calls, traffic.nbytes
        call()
        counts[name] = {"collectives": traffic.calls - calls, "collective_bytes": traffic.nbytes - nbytes}
    return counts


def count_collectives() -> Traffic:
    """Count torch's collectives from here on; to be called before DeepSpeed looks them up."""
    traffic = Traffic()

    def counting(original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            traffic.calls += 1
            traffic.nbytes += sum(t.nbytes for t in (first if isinstance(first, list) else [first]))
            return original(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        counted = counting(getattr(dist, name))
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, counted)
    return traffic


def slowest(mine: list[float]) -> list[float]:
    """The largest value over ranks, for each measurement."""
    return [max(values) for values in zip(*_gather(mine), strict=True)]


def over_ranks(nbytes: int) -> dict[str, int]:
    """Bytes on the rank that has most, and on all ranks."""
    everyone = _gather(nbytes)
    return {"most on a rank": max(everyone), "on all ranks": sum(everyone)}


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main()
