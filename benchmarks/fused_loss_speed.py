"""Seconds of forward and backward for every way to compute the loss, by shape; the floor is the six GEMMs alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch

from benchmarks.deadline import within
from benchmarks.fused_loss_clock import interleaved, release, times
from benchmarks.fused_loss_rivals import (
    COMPILED,
    FLOOR,
    FOREIGN,
    LIGER,
    PLAIN,
    SWAFT,
    Arm,
    Shape,
    Step,
    arms,
    make_operands,
)

VOCABULARIES = (32128, 50265, 128256, 250112)
"""T5; BART and RoBERTa; Llama 3; mT5."""
WIDTHS = (512, 1024, 4096)
ROWS = {"cpu": 256, "cuda": 8192}
BAR_SHAPE = Shape(1024, 512, 32128)
"""The shape of the CPU's bar."""
FIRST = (Shape(8192, 4096, 128256), Shape(8192, 1024, 128256), Shape(8192, 1024, 250112))
"""Measured first on a GPU, where time may run out: the GPU's bars are for these."""
BARS = {BAR_SHAPE.name: {f"{PLAIN} / {SWAFT}": 1.7}}
COMPILED_WIDTH = 1024
"""On a GPU torch.compile is measured only at this width: at others it fuses the same things around other GEMMs."""
LIMIT_S, LIMIT_BYTES = 20.0, 12e9
"""What one shape may take on a CPU."""
TIMES_THE_FLOOR, LOGITS_OF_PLAIN = 5.0, 10
"""Estimates for that limit: all arms together relative to the GEMMs alone, and N x V tensors of the plain form."""


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Every shape that this device can do."""
    if quick:
        shapes = [Shape(24, 16, 200)]
    else:
        shapes = [Shape(ROWS[device], width, vocabulary)
                  for vocabulary, width in itertools.product(VOCABULARIES, WIDTHS)]  # fmt: skip
        shapes = [BAR_SHAPE, *shapes] if device == "cpu" else list(dict.fromkeys((*FIRST, *shapes)))
    rate = _gemm_rate() if device == "cpu" else None
    by_shape: dict[str, object] = {}
    for shape in shapes:
        reason = None if rate is None else too_much(shape, rate)
        if reason is not None and shape != BAR_SHAPE:
            by_shape[shape.name] = {"skipped": reason}
        else:
            by_shape[shape.name] = within(
                f"speed {shape.name}", 8.0, lambda shape=shape: _at(shape, device=device, quick=quick)
            )
            release()
    return {
        "dtype": str(dtype_of(device)),
        "threads": torch.get_num_threads(),
        "bars": BARS if device == "cpu" else {},
        "by shape": by_shape,
    }


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    lines: list[Sequence[object]] = []
    for shape, found in result["by shape"].items():
        if "skipped" in found:
            lines.append((shape, f"skipped: {found['skipped']}"))
            continue
        bar = result["bars"].get(shape, {}).get(f"{PLAIN} / {SWAFT}")
        for name, arm in found["arms"].items():
            lines.append((f"{shape}: {name}", *_columns(arm), f"bar {bar}" if bar and name == SWAFT else ""))
    return lines


def dtype_of(device: str) -> torch.dtype:
    """Dtype of the operands on this device: what one trains with there."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def _at(shape: Shape, *, device: str, quick: bool) -> dict[str, object]:
    operands = make_operands(shape, dtype=dtype_of(device), device=device)
    on_gpu = device == "cuda"
    names = (SWAFT, PLAIN, FLOOR)
    prepared: dict[str, Arm | str] = arms(operands, (*names, *LIGER) if on_gpu else names)
    if quick:
        prepared[COMPILED] = "not among what --quick tries: compiling takes half a minute"
    elif shape == BAR_SHAPE or (on_gpu and shape.width == COMPILED_WIDTH):
        prepared |= arms(operands, (COMPILED,))
    elif on_gpu:
        prepared[COMPILED] = f"measured at width {COMPILED_WIDTH} only"
    settled = on_gpu or shape == BAR_SHAPE
    timings = interleaved(
        prepared,
        warm_up=(2 if on_gpu else 1) if settled else 0,
        rounds=2 if quick else 9 if on_gpu else 5,
        allowance_s=3.0 if on_gpu else 50.0 if settled else 5.0,
        may_fail=FOREIGN,
        keep=_loss,
    )
    return {
        "warm-up rounds": timings.warm_up,
        "rounds": len(timings.seconds[SWAFT]),
        "arms": times(timings, floor=FLOOR, mark=PLAIN),
    }


def _loss(step: Step) -> float | None:
    return None if step.loss is None else step.loss.item()


def _columns(arm: dict) -> Sequence[object]:
    if "skipped" in arm:
        return (f"skipped: {arm['skipped']}",)
    columns = [f"{1e3 * arm['seconds']['median']:.2f} ms"]
    if f"{PLAIN} / this" in arm:
        columns.append(f"{arm[f'{PLAIN} / this']['median']:.2f} x as fast as plain")
    if "share of the floor" in arm:
        columns.append(f"floor {arm['share of the floor']['median']:.2f} of it")
    return columns


def _gemm_rate() -> float:
    """Operations per second of a sufficiently large GEMM."""
    a, b = torch.randn(256, 512), torch.randn(512, 8192)
    torch.mm(a, b)
    begun = time.perf_counter()
    for _ in range(5):
        torch.mm(a, b)
    return 5 * 2.0 * 256 * 512 * 8192 / (time.perf_counter() - begun)


def too_much(shape: Shape, rate: float) -> str | None:
    """Why a shape is left out on a CPU with `rate` operations per second; None: it is not."""
    seconds = TIMES_THE_FLOOR * shape.gemm_operations / rate
    nbytes = 4.0 * shape.vocabulary * (3 * shape.width + LOGITS_OF_PLAIN * shape.rows)
    if nbytes > LIMIT_BYTES:
        return f"about {nbytes / 1e9:.0f} GB; limit {LIMIT_BYTES / 1e9:.0f}"
    if seconds > LIMIT_S:
        return f"about {seconds:.0f} s a round on this machine; limit {LIMIT_S:.0f}"
    return None
