"""Tells which ranks are gone: those that are left say so where all ranks met at the start."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


def roll_call(wait_s: float) -> str:
    """Say that this rank is there, wait for the others to do likewise, and tell which did not.

    Every rank that notices a loss calls this, and all do within moments: one that stops waiting closes its
    connections, and the next notices that. The meeting place (MASTER_ADDR, MASTER_PORT) is asked over a connection
    of its own, since the one that the process group has may be in use by a thread that waits.

    Args:
        wait_s: seconds to wait for the others; and at most about twice as long for the meeting place.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A launcher that starts the ranks anew keeps its store, and what was said in it.
    there = f"swaft/there/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
    began = time.monotonic()
    try:
        store = TCPStore(host, port, timeout=timedelta(seconds=wait_s), wait_for_workers=False)
        store.set(f"{there}{rank}", "")
        time.sleep(max(0.0, began + wait_s - time.monotonic()))
        absent = [str(other) for other in range(world_size) if not store.check([f"{there}{other}"])]
    except RuntimeError:  # of torch: there is no connection, or it is gone
        return f"{host}:{port}, where the ranks met, does not answer: look first at the machine of rank 0"
    if not absent:
        return f"all {world_size} ranks are there, so it is the network between them"
    return f"of {world_size} ranks these said nothing for {wait_s:g} s: {', '.join(absent)}"
