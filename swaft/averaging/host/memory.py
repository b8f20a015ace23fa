"""How much host memory averaging takes, and whether the node has it: all of its ranks share what there is."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from swaft.averaging.rules import Plan
from swaft.distributed import Ranks
from swaft.errors import AveragingError

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def lane_bytes(plan: Plan, numel: int, *, compensated: bool, spilled: bool) -> int:
    """Most bytes of host memory that a rule's lanes take during a run.

    Args:
        plan: the rule's numbers.
        numel: elements of the shard.
        compensated: running means take 6 bytes an element, not 4.
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


def available_bytes() -> int:
    """Host memory this process may still take: the node's, or what its control groups leave of it."""
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def require_host_memory(ranks: Ranks, needed: int) -> None:
    """Refuse, on every rank, what does not fit into the memory of a node (collective).

    Args:
        ranks: the ranks; those of one host share its memory.
        needed: bytes this rank will take.

    Raises:
        AveragingError: naming the host, what is needed and what there is.
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
    """What every control group above this process leaves: its limit less its use, page cache not counted."""
    rooms = []
    for folder, limit_name, use_name in _cgroup_folders():
        try:
            limit = int((folder / limit_name).read_text())  # "max": no limit
            used = int((folder / use_name).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        rooms.append(max(0, limit - used + cache))
    return rooms


def _cgroup_folders() -> list[tuple[Path, str, str]]:
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, names = CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = root / path.lstrip("/")
        folders += [(folder, *names) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return folders
