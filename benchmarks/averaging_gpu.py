"""What an averaging event costs one training process on a GPU, and how fast its copy is.

python -m benchmarks.averaging_gpu                   # on a card; also `benchmarks.averaging --section event`
python -m benchmarks.averaging_gpu --quick           # the same on tiny sizes, on a CPU, but for the copy
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

import swaft
from benchmarks import command
from benchmarks.averaging_event import TINY_BERT, engine_rows
from benchmarks.averaging_training import (
    STEP,
    SWAFT,
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
from benchmarks.deadline import seconds_left, within
from benchmarks.measuring import spread
from swaft.averaging import Engine
from swaft.averaging.host import STAGING_BYTES
from swaft.averaging.host.machine import Workers
from swaft.averaging.host.source import StagedSource

MODELS = {
    "BERT-large, 335M": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "BERT-base, 110M": {},
}
"""The one with the bars comes first, because time may run out."""
MICRO_BATCH = (32, 512)
ACCUMULATED = (1, 4)
"""Micro-batches per step: 16k and 64k tokens."""
BARS = {"16384": 1.01, "65536": 1.005}
PAIRED_S, LEAST_PAIRED_S = 25.0, 9.0
"""Seconds for the paired steps of one configuration: as many as there are, and under a time limit."""
BLOCK_S = 0.7
"""Seconds of one block."""


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Every model at every number of tokens per step, in one process."""
    models, micro_batch = ({"tiny": TINY_BERT}, (2, 8)) if quick else (MODELS, MICRO_BATCH)
    configurations = {}
    for name, sizes in models.items():
        for accumulated in ACCUMULATED:
            tokens = micro_batch[0] * micro_batch[1] * accumulated
            configurations[f"{name}, {tokens} tokens"] = within(
                f"{name}, {tokens} tokens",
                2 * paired_s(),
                lambda sizes=sizes, accumulated=accumulated: _configuration(
                    sizes, micro_batch, accumulated, quick=quick, device=torch.device(device)
                ),
            )
            gc.collect()
    return {
        "precision": "fp32 weights, bf16 autocast, fused AdamW",
        "bars for averaged / bare, by tokens a step": BARS,
        "note": (
            "'total' is from the call until the average holds the member, nothing else running; 'blocking' is what "
            "the training thread stands still while steps follow each other. The others keep their average on the "
            "device."
        ),
        "by configuration": configurations,
    }


def paired_s() -> float:
    """Seconds for the paired steps of one configuration."""
    return PAIRED_S if math.isinf(seconds_left()) else LEAST_PAIRED_S


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    lines: list[Sequence[object]] = []
    for name, found in result["by configuration"].items():
        lines += engine_rows(name, found)
        if "skipped" not in found:
            device, copy = found["device bytes"], found["copy"]
            lines.append(
                (
                    f"{name}: device memory",
                    f"kept {device['kept']:,} B",
                    f"peak of a step grows by {device['peak growth']:,} B",
                )
            )
        if "skipped" not in found and found["copy"]:
            lines.append(
                (
                    f"{name}: copy",
                    f"{copy['staged GB/s']['median']:.1f} of {copy['plain GB/s']['median']:.1f} GB/s",
                    f"share {copy['staged / plain']['median']:.3f}",
                )
            )
    return lines


def _configuration(
    sizes: dict[str, int],
    micro_batch: tuple[int, int],
    accumulated: int,
    *,
    quick: bool,
    device: torch.device,
) -> dict[str, object]:
    on_card = device.type == "cuda"
    model: Any = bert(sizes).to(device)
    numel = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = {
        "input_ids": torch.randint(0, model.config.vocab_size, micro_batch, device=device),
        "labels": torch.randint(0, 2, micro_batch[:1], device=device),
    }

    def step() -> None:
        for _ in range(accumulated):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**batch).loss / accumulated
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # makes the optimizer's state and the allocator's blocks
        step()
    rule = SwitchedSWA()
    before = _allocated()
    averager = swaft.WeightAverager(model, optimizer, rule=rule, total_steps=100_000, first_step=0)
    averager.wait()
    rule.switch.on = False
    # Not the whole device: that would wait for copies that training does not wait for.
    finish = (lambda: torch.cuda.current_stream().synchronize()) if on_card else (lambda: None)
    training = Training(step, averager, rule.switch, finish=finish)
    training.step()
    training.event()
    device_bytes = {
        "kept": _allocated() - before,
        "peak growth": _peak(training, averaged=True) - _peak(training, averaged=False),
    }
    forecast = averager.forecast()
    copy = _copy_rates(averager.engine, rounds=2 if quick else 9) if on_card else None
    others: dict[str, Other] = {
        "torch AveragedModel": torch_average(model),
        "timm's form of EMA, fp32": timm_average(model),
    }
    seconds = event_rounds(training, others, rounds=2 if quick else 7, together=lambda: None)
    step_s = statistics.median(seconds[STEP])
    steps = 2 if quick else min(20, max(2, round(BLOCK_S / step_s)))
    pairs = 2 if quick else min(24, max(4, int(paired_s() / (2 * (steps + 1) * step_s))))
    blocks = paired_blocks(training, pairs=pairs, steps=steps)
    averages: dict[str, object] = {
        SWAFT: times_of(seconds[SWAFT], step_s=step_s, blocking=blocks.blocking)
        | {
            "waits": blocks.waits,
            "host_bytes": forecast.host_bytes + forecast.pinned_bytes,
            "pinned_bytes": forecast.pinned_bytes,
            "device_bytes": device_bytes["kept"],
            "copied_bytes": forecast.copied_bytes,
        }
    }
    for name, other in others.items():
        averages[name] = times_of(seconds[name], step_s=step_s) | {
            "waits": 1,
            "host_bytes": 0,
            "pinned_bytes": 0,
            "device_bytes": other.nbytes,
            "copied_bytes": 0,
        }
    averager.close()
    return {
        "elements": numel,
        "micro-batch": micro_batch,
        "micro-batches a step": accumulated,
        "threads of swaft": forecast.threads,
        "training step s": spread(seconds[STEP]),
        "device bytes": device_bytes,
        "averages": averages,
        "paired steps": ratio_of(blocks),
        "copy": copy,
    }


def _copy_rates(engine: Engine, *, rounds: int) -> dict[str, object]:
    """The rate of the staged copy, including its check for infinities, next to one plain copy to pinned memory."""
    masters, numel = engine.masters(), engine.numel
    workers = Workers(device=engine.device)
    source = StagedSource(
        engine.spans, workers, device=engine.device, api=_TimedEvents(), limit_bytes=STAGING_BYTES
    )
    flat = torch.cat([master.detach().flatten() for master in masters])
    pinned = torch.empty(flat.numel(), pin_memory=True)

    def staged() -> float:
        ready = source.mark_ready()
        source.open(masters, ready, lambda: None)
        source.all_finite()
        for _ in source.tables():  # nothing is averaged, so that a block is free as soon as it is full
            pass
        source.order_after_copies()
        source.close()
        return _milliseconds_since(ready)

    def plain() -> float:
        begun = torch.cuda.Event(enable_timing=True)
        begun.record()
        pinned.copy_(flat, non_blocking=True)
        return _milliseconds_since(begun)

    arms = {"staged GB/s": staged, "plain GB/s": plain}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)
    for _ in range(1 + rounds):
        for name in order.sample(list(arms), len(arms)):
            torch.cuda.synchronize()
            rates[name].append(4 * numel / arms[name]() / 1e6)
    workers.close()
    staged_rates, plain_rates = (values[1:] for values in rates.values())
    return {
        "bytes": 4 * numel,
        "staged GB/s": spread(staged_rates),
        "plain GB/s": spread(plain_rates),
        "staged / plain": spread([a / b for a, b in zip(staged_rates, plain_rates, strict=True)]),
    }


class _TimedEvents:
    """`torch.cuda`, with events that also record the time."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def Event(self) -> torch.cuda.Event:
        """An event that records its time."""
        return torch.cuda.Event(enable_timing=True)


def _milliseconds_since(begun: torch.cuda.Event) -> float:
    ended = torch.cuda.Event(enable_timing=True)
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended)


def _allocated() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _peak(training: Training, *, averaged: bool) -> int:
    """Most device memory held during steps that are, or are not, averaged."""
    on_card = torch.cuda.is_available()
    if on_card:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    training.switch.on = averaged
    for _ in range(3):
        training.step()
        training.averager.step()
    training.averager.wait()
    training.switch.on = False
    if not on_card:
        return 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    command.run("averaging", {"event": sys.modules[__name__]}, None, about=__doc__)
