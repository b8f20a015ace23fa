"""What the chunk size changes: seconds, and the last bits of the result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.fused_loss_clock import finish, interleaved, release, short
from benchmarks.fused_loss_rivals import Shape, Step, forward_backward, make_operands, swaft_loss
from benchmarks.fused_loss_speed import dtype_of
from benchmarks.measuring import significant, spread

MIB = 1 << 20
CPU = (Shape(512, 512, 32128), tuple(size * MIB for size in (8, 16, 32, 64, 128, 256)))
GPU = (Shape(8192, 1024, 128256), tuple(int(size * 1e9) for size in (0.3, 0.6, 1.2, 1.8, 3.6, 7.2)))
QUICK = (Shape(300, 16, 500), (MIB // 4, MIB // 2, 2 * MIB))
DEFAULT = "default"


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Every budget in bytes, and the one that swaft chooses."""
    shape, budgets = QUICK if quick else GPU if device == "cuda" else CPU
    operands = make_operands(shape, dtype=dtype_of(device), device=device)
    named = {DEFAULT: None, **{str(budget): budget for budget in budgets}}
    calls = {
        name: lambda budget=budget: forward_backward(partial(swaft_loss, chunk_bytes=budget), operands)
        for name, budget in named.items()
    }
    largest = calls[str(budgets[-1])]()
    timings = interleaved(
        calls,
        warm_up=2 if device == "cuda" else 0,
        rounds=2 if quick else 7 if device == "cuda" else 3,
        allowance_s=5.0 if device == "cuda" else 25.0,
        keep=lambda step: _distance(step, largest),
    )
    release()
    found: dict[str, dict[str, object]] = {
        name: {"seconds": spread(values), "relative distance from the largest chunk": timings.results[name]}
        for name, values in timings.seconds.items()
    }
    found |= {name: {"skipped": reason} for name, reason in timings.skipped.items()}
    if device == "cuda":
        for name, call in calls.items():
            found[name] |= _peak(call)
    return {
        "shape": shape.name,
        "dtype": str(dtype_of(device)),
        "threads": torch.get_num_threads(),
        "by chunk_bytes": found,
    }


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    lines: list[Sequence[object]] = []
    for name, found in result["by chunk_bytes"].items():
        head = f"{result['shape']}: chunk_bytes {name}"
        if "skipped" in found:
            lines.append((head, f"skipped: {found['skipped']}"))
            continue
        distance = max(found["relative distance from the largest chunk"].values())
        peak = found.get("bytes over inputs and gradients")
        lines.append(
            (
                head,
                f"{1e3 * found['seconds']['median']:.2f} ms",
                f"differs by {distance:.1e}",
                f"{peak / 1e9:.3f} GB" if peak is not None else "",
            )
        )
    return lines


def _distance(step: Step, other: Step) -> dict[str, float]:
    names = ("loss", "d hidden", "d noised", "d weight")
    pairs = zip((step.loss, *step.gradients), (other.loss, *other.gradients), strict=True)
    return {
        name: significant(((one.float() - two.float()).norm() / two.float().norm()).item())
        for name, (one, two) in zip(names, pairs, strict=True)
    }


def _peak(call) -> dict[str, object]:
    release()
    finish()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        step = call()
    except torch.OutOfMemoryError as error:
        return {"skipped": short(error)}
    gradients = sum(gradient.nbytes for gradient in step.gradients)
    return {"bytes over inputs and gradients": torch.cuda.max_memory_allocated() - before - gradients}
