"""The flagship figure: a T5 of 3 B parameters (random weights) on one card, with R3F and averages on the host.

    python -m benchmarks.gpu.flagship OUT.json [--quick]

Steps with averaging every 1, 10 and 100 steps and without it, in turn; the loss fused and on whole logits; device
memory, host memory and waits, and beside them the averager's own forecast.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import T5Config, T5ForConditionalGeneration

import swaft
from benchmarks.averaging_training import SwitchedSWA
from benchmarks.deadline import seconds_left, within
from benchmarks.environment import environment

T5_3B = {"vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32}
TINY = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BATCH = (8, 512, 128)
"""Sentences, source tokens and target tokens."""
EVERY = (1, 10, 100)
ROUNDS = 6


def main(out: Path, *, quick: bool) -> None:
    """Measure part by part, and write what each found as soon as it is there."""
    device = "cpu" if quick or not torch.cuda.is_available() else "cuda"
    sizes, (sentences, source, target) = (TINY, (2, 6, 4)) if device == "cpu" else (T5_3B, BATCH)
    torch.manual_seed(0)
    config = T5Config(**sizes, decoder_start_token_id=0)
    with torch.device(device):
        model: Any = T5ForConditionalGeneration(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    batch = {
        "input_ids": torch.randint(2, config.vocab_size, (sentences, source), device=device),
        "labels": torch.randint(2, config.vocab_size, (sentences, target), device=device),
    }

    def stepping(objective: Any) -> Callable[[], None]:
        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext():
                loss = objective(model, batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    results: dict[str, object] = {
        "environment": environment(),
        "quick": quick,
        "model": sizes,
        "parameters": sum(each.numel() for each in model.parameters()),
        "batch": dict(
            zip(("sentences", "source tokens", "target tokens"), (sentences, source, target), strict=True)
        ),
        "precision": "fp32 weights and AdamW states, bf16 autocast" if device == "cuda" else "fp32",
    }
    fused = stepping(swaft.R3F(preset="relative", sigma=0.5))
    measured: dict[str, Callable[[], dict[str, object]]] = {
        "averaging": lambda: averaging(model, optimizer, fused, device),
        "plain step": lambda: peak_and_time(stepping(swaft.TaskLoss()), device),
        "R3F, fused": lambda: peak_and_time(fused, device),
        "R3F on whole logits": lambda: peak_and_time(
            stepping(swaft.R3F(preset="relative", sigma=0.5, fused=False)), device
        ),
    }
    for name, measure in measured.items():
        try:
            results[name] = within(name, 20.0 if device == "cuda" else 0.0, measure)
        except torch.OutOfMemoryError as error:
            results[name] = {"skipped": f"does not fit on this card: {error}"}
            optimizer.zero_grad()
        gc.collect()
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(name, results[name], flush=True)


def averaging(model: Any, optimizer: Any, step: Callable[[], None], device: str) -> dict[str, object]:
    """Blocks of steps that average every 1, 10 and 100 steps, or not at all, in turn; what the averages take."""
    step()  # AdamW's states and the allocator's blocks are there before anything is measured
    host = psutil.Process().memory_info().rss
    rule = SwitchedSWA()
    averager = swaft.WeightAverager(model, optimizer, rule=rule, total_steps=1_000_000, first_step=0)
    forecast = averager.forecast()
    step()
    averager.step()
    averager.wait()
    spacings = {"without": 0, **{f"every {every}": every for every in EVERY}}
    seconds: dict[str, list[float]] = {name: [] for name in spacings}
    order = random.Random(0)
    for _ in range(ROUNDS if device == "cuda" else 1):
        for name in order.sample(list(spacings), len(spacings)):
            steps = max(2, spacings[name])
            if seconds_left() < 15 or (steps > 10 and len(seconds[name]) >= 2):
                continue
            begun = time.perf_counter()
            for number in range(steps):
                step()
                rule.switch.on = spacings[name] > 0 and number % spacings[name] == 0
                averager.step()
            synchronize(device)
            seconds[name].append((time.perf_counter() - begun) / steps)
            averager.wait()
    waits, grown = averager.waits, psutil.Process().memory_info().rss - host
    averager.close()
    bare = statistics.median(seconds["without"] or [float("nan")])
    return {
        "seconds a step": seconds,
        "ratio to a bare step": {
            name: statistics.median(each) / bare for name, each in seconds.items() if each
        },
        "waits": {"count": waits.count, "seconds": waits.seconds},
        "host bytes": grown,
        "forecast": str(forecast).splitlines(),
    }


def peak_and_time(step: Callable[[], None], device: str) -> dict[str, object]:
    """Median seconds of a step, and the peak of device memory."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds a step": statistics.median(times[1:]), "peak bytes on the device": peak}


def synchronize(device: str) -> None:
    """Wait for the card's current stream, where there is one."""
    if device == "cuda":
        torch.cuda.current_stream().synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]), quick="--quick" in sys.argv[2:])
