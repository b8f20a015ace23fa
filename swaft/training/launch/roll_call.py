"""Tells which ranks are gone: those that are left say so where all ranks met at the start."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import _world

TAG = 7_305_881
"""Of a message that nobody sends."""


def roll_call(wait_s: float) -> str:
    """Say that this rank is there, wait for the others to do likewise, and tell which did not.

    Every rank that notices a loss calls this, and lets go of its connections first, so that those that wait for it
    notice too. Under NCCL they may not: a rank that is not named is there, one that is may be waiting. The meeting
    place (MASTER_ADDR, MASTER_PORT) is asked over a connection of its own, since a thread that waits may be using
    that of the process group, and in a thread of its own, since what has accepted a connection may never answer.

    Args:
        wait_s: seconds to wait for the others; it returns after about three times as many at most.
    """
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(_ask(wait_s)), daemon=True)
    asking.start()
    asking.join(3 * wait_s)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return found[0] if found else f"{place}, where the ranks met, does not answer"


def _ask(wait_s: float) -> str:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A launcher that starts the ranks anew keeps its store, and what was said in it.
    there = f"swaft/there/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
    began = time.monotonic()
    with suppress(Exception):  # whatever torch says of groups that are no more
        _let_go()
    try:
        store = TCPStore(host, port, timeout=timedelta(seconds=wait_s), wait_for_workers=False)
        store.set(f"{there}{rank}", "")
        time.sleep(max(0.0, began + wait_s - time.monotonic()))
        absent = [str(other) for other in range(world_size) if not store.check([f"{there}{other}"])]
    except RuntimeError:  # of torch: there is no connection, or it is gone
        return f"{host}:{port}, where the ranks met, does not answer: look first at the machine of rank 0"
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(wait_s)  # the place is in this process, and others may still be asking
    if not absent:
        return f"all {world_size} ranks are there, so it is the network between them"
    return f"of {world_size} ranks these said nothing for {wait_s:g} s: {', '.join(absent)}"


def _let_go() -> None:
    """Close this rank's connections of gloo, so that ranks that wait for it wait no longer.

    Gloo closes all connections of a group where a message does not come in time.
    """
    for group in list(_world.pg_map):
        if "gloo" not in dist.get_backend(group):
            continue
        for peer in dist.get_process_group_ranks(group):
            if peer == dist.get_rank():
                continue
            try:
                message = dist.irecv(torch.empty(1), src=peer, group=group, tag=TAG)
                if message is not None:
                    message.wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                if "timed out" in str(error).lower():
                    break
