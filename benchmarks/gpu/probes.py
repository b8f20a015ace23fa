"""Short measurements besides the benchmarks: limits of the card, the loss by kernel, averaging events by size.

python -m benchmarks.gpu.probes OUT.json [--quick]
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import swaft
from benchmarks.deadline import within
from benchmarks.environment import environment
from benchmarks.fused_loss_clock import finish
from benchmarks.fused_loss_rivals import Shape, forward_backward, make_operands, six_gemms, swaft_loss
from benchmarks.fused_loss_speed import dtype_of

SHAPES = (
    (8192, 4096, 128256),
    (8192, 1024, 250112),
    (8192, 1024, 50265),
    (8192, 1024, 32128),
    (8192, 512, 32128),
)
"""Rows, hidden size and vocabulary."""
ELEMENTS = (110_000_000, 335_000_000, 1_000_000_000, 2_850_000_000)
"""Elements of one averaged weight: BERT base, BERT large, and two of the size of T5-3B."""
GEMM = ("gemm", "cutlass", "nvjet", "xmma")
"""Parts of the names of kernels that multiply matrices."""


def main(out: Path, *, quick: bool) -> None:
    """Run every probe, and write each result as soon as it is there."""
    device = "cpu" if quick or not torch.cuda.is_available() else "cuda"
    results: dict[str, object] = {"environment": environment(), "quick": quick}
    probes: dict[str, Callable[[], dict[str, object]]] = {}
    if device == "cuda":
        probes |= {"ceilings": ceilings, "what is taken for granted": taken_for_granted}
    for shape in SHAPES if device == "cuda" else ((32, 16, 200),):
        probes[f"loss {shape}"] = lambda shape=shape: loss_by_kernel(shape, device)
    for numel in ELEMENTS if device == "cuda" else (100_000,):
        probes[f"averaging {numel:,}"] = lambda numel=numel: averaging_event(numel, device)
    for name, probe in probes.items():
        results[name] = within(name, 5.0, probe)
        gc.collect()
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(name, results[name], flush=True)


def ceilings() -> dict[str, object]:
    """What the card and its bus can do: copies and bf16 products."""
    a = torch.empty(1 << 30, device="cuda").uniform_()
    b = torch.empty_like(a)
    host = torch.empty(1 << 28, pin_memory=True)
    part = a[: 1 << 28]
    rates: dict[str, object] = {
        "device copy GB/s": 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) / 1e6,
        "to pinned memory GB/s": part.nbytes
        / milliseconds(lambda: host.copy_(part, non_blocking=True))
        / 1e6,
        "from pinned memory GB/s": part.nbytes
        / milliseconds(lambda: part.copy_(host, non_blocking=True))
        / 1e6,
    }
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return rates | {"bf16 product TFLOP/s": 2 * 8192.0**3 / milliseconds(lambda: x @ y) / 1e9}


def taken_for_granted() -> dict[str, object]:
    """Check what the library relies on torch for: errors against float64, and yes-or-no facts."""
    a, b = (torch.randn(300, 129, device="cuda").bfloat16() for _ in range(2))
    wide = torch.mm(a, b.mT, out_dtype=torch.float32)
    exact = a.double() @ b.double().mT
    one = torch.zeros(1 << 20, device="cuda")
    one[777_777] = torch.nan
    scaled = torch.randn(1 << 20, device="cuda").bfloat16()
    third = torch.tensor(1 / 3, device="cuda")
    return {
        "bf16 product with fp32 output, error": float((wide.double() - exact).norm() / exact.norm()),
        "an infinity norm sees one NaN": bool(
            torch.stack(torch._foreach_norm([one, one[:9]], torch.inf))[0].isnan()  # pyright: ignore
        ),
        "bf16 times 0-dim fp32, realised over wanted": float(
            ((scaled * third).double() / (scaled.double() / 3)).nanmean()
        ),
    }


def loss_by_kernel(shape: tuple[int, int, int], device: str) -> dict[str, object]:
    """Milliseconds of forward and backward of the loss, of its six products alone, and by kind of kernel."""
    operands = make_operands(Shape(*shape), dtype=dtype_of(device), device=device)
    step = partial(forward_backward, swaft_loss, operands)
    floor = milliseconds(six_gemms(operands))
    total = milliseconds(step)
    found: dict[str, object] = {"ms": total, "six products ms": floor, "share of the floor": floor / total}
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            finish()
        spent: dict[str, float] = {"products": 0.0, "rows kernel": 0.0, "other": 0.0}
        for event in profiler.key_averages():
            kind = "products" if any(part in event.key.lower() for part in GEMM) else "other"
            kind = "rows kernel" if "rows" in event.key.lower() else kind
            spent[kind] += event.self_device_time_total / 1e3
        found["ms by kind of kernel"] = spent
    return found


def averaging_event(numel: int, device: str) -> dict[str, object]:
    """Time that an event costs the training thread, and time until the average holds the member."""
    model = torch.nn.Linear(numel >> 10, 1 << 10, bias=False, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=99)
    averager.wait()
    blocked, whole = [], []
    for _ in range(4):
        model.weight.grad = model.weight.detach().clone()
        optimizer.step()
        model.weight.grad = None
        finish()
        begun = time.perf_counter()
        averager.step()
        blocked.append(time.perf_counter() - begun)
        averager.wait()
        whole.append(time.perf_counter() - begun)
    threads = averager.forecast().threads
    averager.close()
    event = statistics.median(whole[1:])
    return {
        "threads": threads,
        "blocked ms": 1e3 * min(blocked[1:]),
        "event ms": 1e3 * event,
        "elements a second": model.weight.numel() / event,
    }


def milliseconds(call: Callable[[], object], rounds: int = 5) -> float:
    """Return the median milliseconds of a call, after two warmup calls."""
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        finish()
        begun = time.perf_counter()
        call()
        finish()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


if __name__ == "__main__":
    main(Path(sys.argv[1]), quick="--quick" in sys.argv[2:])
