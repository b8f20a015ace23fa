"""The threads that do the arithmetic: how many, and on which cores.

They are Python threads that spend their time in compiled loops without the interpreter lock. torch's own threads
are left alone: under torchrun there is one, and a count set in one thread leaks into those started after it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch

from swaft.options import Count, require_value

MAX_THREADS = 8
"""Threads a rank takes by itself: more seldom help, since memory is shared by all ranks of a node."""

Result = TypeVar("Result")


class Workers:
    """A fixed number of threads, kept on cores near a device's memory.

    Args:
        threads: how many; None: half of this rank's share of the cores it may use, at most `MAX_THREADS`.
        device: whose host memory the work is in.

    Raises:
        ConfigError: fewer than one thread.
    """

    def __init__(self, threads: int | None = None, *, device: torch.device | None = None):
        require_value("threads", threads, Count | None)
        self.threads = default_threads() if threads is None else threads
        cores = cores_near(device)
        self._pool = ThreadPoolExecutor(
            self.threads, thread_name_prefix="swaft-average", initializer=_stay_on, initargs=(cores,)
        )

    def run(self, function: Callable[..., Result], parts: Iterable[tuple]) -> list[Result]:
        """Call ``function(*part)`` for every part, all at once; returns the results in order.

        Nothing runs any more when this returns or raises: compiled loops read memory by its address.
        """
        futures: list[Future[Result]] = []
        try:
            for part in parts:
                futures.append(self._pool.submit(function, *part))
        finally:
            wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def default_threads() -> int:
    """Half of this rank's share of the cores the process may run on, between 1 and `MAX_THREADS`."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_THREADS, len(_allowed_cores()) // ranks_here // 2))


def cores_near(device: torch.device | None) -> set[int]:
    """The cores this process may use that share a memory node with a device; all of them where that is unknown."""
    allowed = _allowed_cores()
    if device is None or device.type != "cuda":
        return allowed
    properties = torch.cuda.get_device_properties(device)
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    cores = Path(f"/sys/bus/pci/devices/{address}/local_cpulist")
    try:
        return parse_cores(cores.read_text()) & allowed or allowed
    except (OSError, ValueError):
        return allowed


def parse_cores(text: str) -> set[int]:
    """The cores of a kernel list such as ``0-3,8,10-11``."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def _allowed_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _stay_on(cores: set[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        # Of the calling thread, on Linux. Where it is forbidden, threads run wherever they are put.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
