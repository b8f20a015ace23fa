"""What may befall a rank, at a moment that its own doings define."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from disk_calls import ENDING, count_to, watch

from swaft.averaging import WeightAverager

DELAY_S = 3.0
HOUR_S = 3600.0


def arrange(
    do: str, *, folder: str, at_disk_calls: list[int] | None = None, in_swap: int | None = None
) -> None:
    """Have something befall this process.

    Args:
        do: what; a key of `DEEDS`.
        folder: of the run.
        at_disk_calls: just before which of the calls that touch the disk there, by number.
        in_swap: or in the how-manieth evaluation of averaged weights.
    """
    if at_disk_calls is not None:
        watch(folder, ENDING, count_to(at_disk_calls, DEEDS[do]))
    if in_swap is not None:
        _at_swap(in_swap, DEEDS[do])


def _at_swap(number: int, act: Callable[[], None]) -> None:
    swapped_in, see = WeightAverager.swapped_in, count_to([number], act)

    @contextmanager
    def watched(averager: WeightAverager, *arguments: Any, **options: Any) -> Iterator[None]:
        with swapped_in(averager, *arguments, **options):
            see("swapped_in", "")
            yield

    WeightAverager.swapped_in = watched


def _send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _turn_the_clock_back() -> None:
    now = time.time
    time.time = lambda: now() - HOUR_S


DEEDS: dict[str, Callable[[], None]] = {
    "kill": _send(signal.SIGKILL),
    "stop": _send(signal.SIGSTOP),
    "term": _send(signal.SIGTERM),
    "usr1": _send(signal.SIGUSR1),
    "sleep": lambda: time.sleep(DELAY_S),
    "turn the clock back": _turn_the_clock_back,
}
