"""How close one update of an average comes to the memory bandwidth; the reference is an in-place ``a += b``.

Every form works on the same host memory, far larger than the caches, in rounds of random order. Rates count the
bytes that a form has to move; it may move more.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numba
import torch
from numba import types

from benchmarks.measuring import spread
from swaft.averaging.host.lanes import Lanes
from swaft.averaging.host.machine import Workers
from swaft.averaging.host.source import HostSource
from swaft.averaging.layout import Span
from swaft.averaging.rules import SWA

BAR = 0.90
COMPENSATED, PLAIN = "compensated (swaft)", "plain (swaft)"
MARKS = "a += b (native)", "a += b (torch)"
BYTES = {
    COMPENSATED: 16,  # read mean, compensation and weights, write mean and compensation: 4 + 2 + 4 + 4 + 2
    PLAIN: 12,
    MARKS[0]: 12,
    MARKS[1]: 12,
    "lerp_ (torch)": 12,
    "mul_, add_ (torch)": 12,  # it moves 20: two passes
}
SETTLE_S = 0.005
"""Pause between forms: torch's threads spin for a while after their work, on cores that the next form needs."""
WEIGHT = 1e-3
MANY_MEMBERS = SWA(start=0).plan(total_steps=1_000_000)


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Rates of every form at 1, 2, 4, ... and all cores."""
    numel, rounds = (1 << 16, 3) if quick else (1 << 26, 21)
    cores = usable_cores()
    counts = sorted({*(1 << i for i in range(cores.bit_length()) if 1 << i <= cores), cores})
    return {
        "elements": numel,
        "rounds": rounds,
        "bytes an element": BYTES,
        "bar for compensated / mark": BAR,
        "by threads": {str(threads): _at(threads, numel, rounds) for threads in counts},
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    lines: list[Sequence[object]] = []
    for threads, at in result["by threads"].items():
        for name, rate in at["GB/s"].items():
            lines.append((f"{threads} threads: {name}", f"{rate['median']:.2f} GB/s"))
        ratio = at["compensated / mark"]
        lines.append((f"{threads} threads: compensated / mark", f"{ratio['median']:.3f}", f"bar {BAR}"))
    return lines


def _at(threads: int, numel: int, rounds: int) -> dict[str, object]:
    workers = Workers(threads)
    forms = _forms(workers, numel)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(forms), len(forms)):
            begun = time.perf_counter()
            forms[name]()
            seconds[name].append(time.perf_counter() - begun)
            time.sleep(SETTLE_S)
    workers.close()
    rates = {name: [BYTES[name] * numel / each / 1e9 for each in values] for name, values in seconds.items()}
    mark = max(MARKS, key=lambda name: statistics.median(rates[name]))
    ratios = [ours / theirs for ours, theirs in zip(rates[COMPENSATED], rates[mark], strict=True)]
    return {
        "GB/s": {name: spread(values) for name, values in rates.items()},
        "mark": mark,
        "compensated / mark": spread(ratios),
    }


def _forms(workers: Workers, numel: int) -> dict[str, Callable[[], Any]]:
    """Every form as a call, on the same two vectors; the updates take the same path as in training."""
    member = torch.randn(numel, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    compensated, plain = (Lanes(MANY_MEMBERS, numel, workers, compensated=each) for each in (True, False))
    source = HostSource([Span(0, 0, 0, numel)], workers)
    source.open([member], None, lambda: None)
    tables = next(source.tables())

    def take_into(lanes: Lanes) -> Callable[[], None]:
        def take() -> None:
            updates = lanes.begin()
            lanes.take(updates, tables)
            lanes.end(updates)

        take()  # the first copies, and touches the memory
        return take

    updates = {COMPENSATED: take_into(compensated), PLAIN: take_into(plain)}
    mean = compensated.shard()
    size = -(-numel // workers.threads)
    parts = [
        (mean.numpy()[first : first + size], member.numpy()[first : first + size])
        for first in range(0, numel, size)
    ]
    return updates | {
        MARKS[0]: lambda: workers.run(_add, parts),
        MARKS[1]: _with_threads(workers.threads, lambda: mean.add_(member)),
        "lerp_ (torch)": _with_threads(workers.threads, lambda: mean.lerp_(member, WEIGHT)),
        "mul_, add_ (torch)": _with_threads(
            workers.threads, lambda: mean.mul_(1 - WEIGHT).add_(member, alpha=WEIGHT)
        ),
    }


@numba.njit(types.void(types.float32[::1], types.float32[::1]), nogil=True, error_model="numpy")
def _add(a: Any, b: Any) -> None:
    for i in range(a.size):
        a[i] = a[i] + b[i]


def _with_threads(threads: int, call: Callable[[], Any]) -> Callable[[], None]:
    """A call with torch's thread count set only around it: the count leaks into threads started later."""

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            call()
        finally:
            torch.set_num_threads(before)

    return run
