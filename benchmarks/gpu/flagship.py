"""The flagship figure: a T5 of 3 B parameters (random weights) on one card, with R3F and averages on the host.

    python -m benchmarks.gpu.flagship OUT.json [--quick]

Steps with averaging every 1, 10 and 100 steps and without it, in turn; the loss fused and on whole logits; device
memory, host memory, bytes copied and waits; how many sentences fit. The results include what `swaft plan` predicts
for the same run, from results/flagship_plan.json (`benchmarks.gpu.prediction`).
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
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import swaft
from benchmarks.averaging_training import SwitchedSWA
from benchmarks.deadline import seconds_left, within
from benchmarks.environment import environment

PLAN = Path(__file__).parents[1] / "results" / "flagship_plan.json"
T5_3B = {"vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32}
TINY = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BATCH, TINY_BATCH = (8, 512, 128), (2, 6, 4)
"""Sentences, source tokens and target tokens."""
SIGMA = 0.5
"""Noise, as a share of the embeddings' size."""
RUNS: dict[str, bool | None] = {"plain step": None, "R3F, fused": True, "R3F on whole logits": False}
"""Whether the loss is fused; None: no noise."""
EVERY = (1, 10, 100)
ROUNDS = 6


def main(out: Path, *, quick: bool) -> None:
    """Measure part by part, and write each result as soon as it is there."""
    device = torch.device("cpu" if quick or not torch.cuda.is_available() else "cuda")
    on_card = device.type == "cuda"
    sizes, batch = (T5_3B, BATCH) if on_card else (TINY, TINY_BATCH)
    results: dict[str, object] = {
        "environment": environment(),
        "quick": quick,
        "model": sizes,
        "batch": dict(zip(("sentences", "source tokens", "target tokens"), batch, strict=True)),
        "precision": "fp32 weights and AdamW states, bf16 autocast" if on_card else "fp32",
        "predicted by swaft plan": json.loads(PLAN.read_text())["runs"] if on_card else None,
    }
    try:
        measure(results, out, sizes, batch, device)
    except torch.OutOfMemoryError as error:
        results["skipped"] = f"the model and its optimizer do not fit on this card: {error}"
        write(out, results)


def measure(
    results: dict[str, object],
    out: Path,
    sizes: dict[str, int],
    batch: tuple[int, int, int],
    device: torch.device,
) -> None:
    """Add to the results what was found for every run, or why it was not made.

    Raises:
        torch.OutOfMemoryError: the model does not fit.
    """
    torch.manual_seed(0)
    with device:
        model = make_model(sizes).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    results["parameters"] = sum(each.numel() for each in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)  # as the recipes build it
    rows = make_batch(sizes, batch, device)

    def stepping(fused: bool | None, rows: dict[str, Tensor] = rows) -> Callable[[], None]:
        noisy = swaft.R3F(preset="relative", sigma=SIGMA, fused=bool(fused))
        objective = swaft.TaskLoss() if fused is None else noisy

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
                loss = objective(model, rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def with_sentences(fused: bool | None, sentences: int) -> Callable[[], None]:
        return stepping(fused, make_batch(sizes, (sentences, *batch[1:]), device))

    measured: dict[str, Callable[[], dict[str, object]]] = {
        name: lambda fused=fused: peak_and_time(stepping(fused), device.type) for name, fused in RUNS.items()
    }
    measured["averaging"] = lambda: averaging(model, optimizer, stepping(True), device.type)
    for name in ("R3F on whole logits", "R3F, fused"):
        measured[f"{name}: sentences that fit"] = lambda fused=RUNS[name]: sentences_that_fit(
            lambda count: with_sentences(fused, count), batch[0], device.type
        )
    for name, measurement in measured.items():
        results[name] = within(name, 15.0 if device.type == "cuda" else 0.0, measurement)
        optimizer.zero_grad()  # left by a step that did not fit
        gc.collect()
        write(out, results)
        print(name, results[name], flush=True)
    for line in beside(results):
        print(line, flush=True)


def make_model(sizes: dict[str, int]) -> Any:
    """Make the T5 with random weights, in fp32, on torch's current default device."""
    options: dict[str, Any] = {**sizes, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**options))


def make_batch(sizes: dict[str, int], batch: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
    """Make random token ids, without padding."""
    sentences, source, target = batch
    return {
        "input_ids": torch.randint(2, sizes["vocab_size"], (sentences, source), device=device),
        "labels": torch.randint(2, sizes["vocab_size"], (sentences, target), device=device),
    }


def beside(results: dict[str, Any]) -> list[str]:
    """Print the peaks of device memory next to the predicted ones, and the averages' bytes."""
    plan = results["predicted by swaft plan"]
    if plan is None:
        return []
    lines = [f"{'':<22}{'predicted':>12}{'measured':>12}  GB on the device"]
    for name in RUNS:
        measured = results[name].get("peak bytes on the device")
        shown = f"{measured / 1e9:12.1f}" if measured else f"  {results[name].get('skipped', '-')}"
        lines.append(f"{name:<22}{plan[name]['bytes on the device'] / 1e9:12.1f}{shown}")
    averages, found = plan["R3F, fused"], results["averaging"]
    if "host bytes" in found:
        predicted = averages["host bytes of averages"] + averages["pinned bytes"]
        lines.append(f"{'averages, on the host':<22}{predicted / 1e9:12.1f}{found['host bytes'] / 1e9:12.1f}")
    return lines


def write(out: Path, results: dict[str, object]) -> None:
    """Write the results so far."""
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def averaging(model: Any, optimizer: Any, step: Callable[[], None], device: str) -> dict[str, object]:
    """Time blocks of steps that average every 1, 10 and 100 steps, or not at all, in turn; and averages' costs."""
    step()  # AdamW's states and the allocator's blocks are there before anything is measured
    host = psutil.Process().memory_info().rss
    rule = SwitchedSWA()
    averager = swaft.WeightAverager(model, optimizer, rule=rule, total_steps=1_000_000, first_step=0)
    forecast = averager.forecast()
    step()
    averager.step()
    averager.wait()
    spacings = {"without": 0} | {f"every {every}": every for every in EVERY[: 3 if device == "cuda" else 2]}
    seconds: dict[str, list[float]] = {name: [] for name in spacings}
    order = random.Random(0)
    rule.switch.on = False
    synchronize(device)
    begun = time.perf_counter()
    step()
    averager.step()
    synchronize(device)
    a_step = time.perf_counter() - begun
    for _ in range(ROUNDS if device == "cuda" else 1):
        for name in order.sample(list(spacings), len(spacings)):
            steps = max(2, spacings[name])
            if 2 * steps * a_step > seconds_left() - 10 or (steps > 10 and len(seconds[name]) >= 2):
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
        "bytes copied an event": forecast.copied_bytes,
        "forecast": str(forecast).splitlines(),
    }


def peak_and_time(step: Callable[[], None], device: str) -> dict[str, object]:
    """Median seconds of a step, and the peak of device memory once the optimizer has its states."""
    step()
    peak, times = peak_of(step, device), []
    for _ in range(3):
        begun = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return {"seconds a step": statistics.median(times), "peak bytes on the device": peak}


def sentences_that_fit(
    stepping: Callable[[int], Callable[[], None]], first: int, device: str
) -> dict[str, object]:
    """Double the batch until it does not fit, or until no time is left: peaks of device memory by sentences.

    Args:
        stepping: makes the step for a batch of this many sentences.
        first: sentences to start with.
        device: where it runs; on a CPU two batches are tried.
    """
    peaks: dict[str, object] = {}
    sentences = first
    while True:
        begun = time.perf_counter()
        try:
            peaks[str(sentences)] = peak_of(stepping(sentences), device)
        except torch.OutOfMemoryError:
            return {"peak bytes by sentences": peaks, "do not fit": sentences}
        sentences *= 2
        took = time.perf_counter() - begun
        if 3 * took > seconds_left() - 5 or (device == "cpu" and sentences > 2 * first):
            return {"peak bytes by sentences": peaks, "not tried": sentences}


def peak_of(step: Callable[[], None], device: str) -> int | None:
    """Peak of device memory in one step; None on a CPU."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def synchronize(device: str) -> None:
    """Wait for the card's current stream, if there is one."""
    if device == "cuda":
        torch.cuda.current_stream().synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]), quick="--quick" in sys.argv[2:])
