"""A machine's resources for averaging: threads near the masters' memory, and host memory that its ranks share.

The threads are Python threads that spend their time in compiled loops without the GIL. torch's own threads are not
used: under torchrun there is one, and a thread count set in one thread leaks into those started after it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from swaft.averaging.rules import Plan
from swaft.distributed import Ranks
from swaft.errors import AveragingError
from swaft.options import Count, require_value

MAX_THREADS = 8
"""Default maximum of threads per rank: more rarely help, since all ranks of a node share its memory bandwidth."""
CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
PCI_DEVICES = Path("/sys/bus/pci/devices")

Result = TypeVar("Result")


class Workers:
    """A fixed number of threads, kept on cores near a device's memory.

    Args:
        threads: how many; None: half of this rank's share of the cores it may use, at most `MAX_THREADS`.
        device: the threads are kept near its host memory.

    Raises:
        ConfigError: fewer than one thread.
    """

    def __init__(self, threads: int | None = None, *, device: torch.device | None = None):
        require_value("threads", threads, Count | None)
        self.threads = default_threads() if threads is None else threads
        cores = cores_near(device)
        self._closed = False
        self._pool = ThreadPoolExecutor(
            self.threads, thread_name_prefix="swaft-average", initializer=_stay_on, initargs=(cores,)
        )

    def run(self, function: Callable[..., Result], parts: Iterable[tuple]) -> list[Result]:
        """Call ``function(*part)`` for every part in parallel, once closed in turn; returns the results in order.

        Nothing is still running when this returns or raises: compiled loops read memory by its address.
        """
        if self._closed:  # what is averaged can still be read
            return [function(*part) for part in parts]
        futures: list[Future[Result]] = []
        try:
            for part in parts:
                futures.append(self._pool.submit(function, *part))
        finally:
            wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Let the threads end."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)


def default_threads() -> int:
    """Half of this rank's share of the cores the process may run on, between 1 and `MAX_THREADS`."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_THREADS, len(allowed_cores()) // ranks_here // 2))


def cores_near(device: torch.device | None) -> set[int]:
    """The cores this process may use that share a NUMA node with a device; all of them if that is unknown."""
    allowed = allowed_cores()
    if device is None or device.type != "cuda":
        return allowed
    found = torch.cuda.get_device_properties(device)
    try:
        address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        return parse_cores((PCI_DEVICES / address / "local_cpulist").read_text()) & allowed or allowed
    except (AttributeError, OSError, ValueError):  # no such address, or a virtual device
        return allowed


def parse_cores(text: str) -> set[int]:
    """The cores of a kernel list such as ``0-3,8,10-11``."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def allowed_cores() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _stay_on(cores: set[int]) -> None:
    # For the calling thread. If this is forbidden, or not Linux, threads run wherever the system puts them.
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, cores)


def lane_bytes(plan: Plan, numel: int, *, compensated: bool, spilled: bool) -> int:
    """Peak bytes of host memory that a rule's lanes take during a run.

    Args:
        plan: the rule's plan.
        numel: elements of the shard.
        compensated: running means take 6 bytes per element, not 4.
        spilled: finished lanes move to disk.
    """
    size = {True: 6 if compensated else 4, False: 4}
    if not spilled:
        return numel * sum(size[running] for running in plan.lanes)
    held, peak = set(), 0
    for n in range(plan.num_members):
        held |= {update.lane for update in plan.updates(n)}
        peak = max(peak, sum(size[plan.lanes[lane]] for lane in held))
        held -= set(plan.finished(n))
    return numel * peak


def swap_bytes(plans: Iterable[Plan], numel: int, *, stashed: bool) -> int:
    """Bytes of host memory that every run takes beside its lanes to evaluate an average and to export weights.

    Args:
        plans: the rules' plans; an average of several lanes is put together before it is used.
        numel: elements of the shard.
        stashed: a swap keeps the live weights, because masters and working weights are the same tensors.
    """
    swap = stashed + any(len(plan.lanes) > 1 for plan in plans)
    return 4 * numel * max(swap, 1)  # an export of the last weights copies the shard


def available_bytes() -> int:
    """Host memory this process may still take: the node's, or what its control groups leave."""
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def require_host_memory(ranks: Ranks, needed: int) -> None:
    """Raise on every rank if the averages do not fit in the memory of a node (collective).

    Args:
        ranks: the ranks; those of one host share its memory.
        needed: bytes this rank will take.

    Raises:
        AveragingError: names the host, the memory needed and the memory available.
    """
    host = socket.gethostname()
    everyone = ranks.gather((host, needed, available_bytes()))
    for name in sorted({each for each, _, _ in everyone}):
        here = [(need, room) for each, need, room in everyone if each == name]
        total, room = sum(need for need, _ in here), min(room for _, room in here)
        if total > room:
            raise AveragingError(
                f"averaging would take {total / 2**30:.1f} GiB of host memory on {name} ({len(here)} ranks), where "
                f"{room / 2**30:.1f} GiB are left; use fewer rules or blocks, move finished blocks to disk "
                "(spill_dir), choose averaging.precision=plain, or give the job more memory"
            )


def _cgroup_rooms() -> list[int]:
    """What every control group above this process leaves: its limit minus its use, not counting page cache."""
    rooms: list[int] = []
    if not OWN_GROUPS.exists():
        return rooms
    for line in OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit_name, use_name = CGROUP, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, use_name = CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (each for each in (own, *own.parents) if each.is_relative_to(root)):
            # Some groups cannot be read, and "max" means no limit.
            with contextlib.suppress(OSError, ValueError):
                room = int((folder / limit_name).read_text()) - int((folder / use_name).read_text())
                statistics = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
                rooms.append(max(0, room + cache))
    return rooms
