"""Timing of the fused loss: rounds of all arms in random order, on any device, with failures recorded."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measuring import significant, spread


@dataclass
class Timings:
    """Seconds of every arm, by round."""

    warm_up: int
    """Rounds before the measured ones."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    """What `keep` returned for the last result of each arm."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why an arm was not timed."""


def interleaved(
    arms: Mapping[str, Callable[[], Any] | str],
    *,
    warm_up: int,
    rounds: int,
    allowance_s: float,
    may_fail: Sequence[str] = (),
    keep: Callable[[Any], Any] = lambda result: None,
) -> Timings:
    """Time all arms round by round, each round in its own order.

    Args:
        arms: by name: a call, or the reason why there is none.
        warm_up: rounds before the measured ones.
        rounds: most rounds to measure; at least one is.
        allowance_s: seconds for the measured rounds: none is started that would probably end later.
        may_fail: arms for which any failure is recorded; for the others only lack of memory is.
        keep: applied to each result outside the timing; the result itself is dropped.
    """
    timings = Timings(warm_up)
    running: dict[str, Callable[[], Any]] = {}
    for name, arm in arms.items():
        if isinstance(arm, str):
            timings.skipped[name] = arm
        else:
            running[name] = arm
            timings.seconds[name] = []
    order, begun, longest = random.Random(0), 0.0, 0.0
    for i in range(warm_up + rounds):
        round_begun = time.perf_counter()
        if i == warm_up:
            begun = round_begun
        elif i > warm_up and round_begun - begun + longest > allowance_s:
            break
        for name in order.sample(list(running), len(running)):
            reason = _timed(name, running[name], timings, keep, foreign=name in may_fail)
            if reason is not None:
                timings.skipped[name] = reason
                del running[name], timings.seconds[name]
                release()
        if i >= warm_up:
            longest = max(longest, time.perf_counter() - round_begun)
        else:
            for values in timings.seconds.values():
                values.clear()
    return timings


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, object]:
    """Ratio of two arms, round by round: median and extremes."""
    values = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {
        "median": significant(statistics.median(values)),
        "range": [significant(min(values)), significant(max(values))],
    }


def times(timings: Timings, *, floor: str, mark: str) -> dict[str, dict[str, object]]:
    """Every arm's seconds, their ratio to the mark's, and the floor's share of them.

    Args:
        timings: see there.
        floor: the arm that no other can beat.
        mark: the arm with which the others are compared.
    """
    found: dict[str, dict[str, object]] = {}
    for name, values in timings.seconds.items():
        arm: dict[str, object] = {"seconds": spread(values)}
        if mark in timings.seconds:
            arm[f"{mark} / this"] = ratios(timings.seconds[mark], values)
        if floor in timings.seconds:
            arm["share of the floor"] = ratios(timings.seconds[floor], values)
        if timings.results.get(name) is not None:
            arm["loss"] = timings.results[name]
        found[name] = arm
    return found | {name: {"skipped": reason} for name, reason in timings.skipped.items()}


def finish() -> None:
    """Return once the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Return unreferenced memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def short(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _timed(
    name: str, call: Callable[[], Any], timings: Timings, keep: Callable[[Any], Any], *, foreign: bool
) -> str | None:
    finish()
    begun = time.perf_counter()
    try:
        result = call()
        finish()
    except torch.OutOfMemoryError as error:
        return short(error)
    except Exception as error:
        if not foreign:
            raise
        return short(error)
    timings.seconds[name].append(time.perf_counter() - begun)
    timings.results[name] = keep(result)
    return None
