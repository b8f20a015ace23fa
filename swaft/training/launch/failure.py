"""Ends a recipe with one message.

Without it, a lost rank shows only as gloo's addresses in a traceback of every other rank, none of which says which
rank it was. And ranks whose launcher has ended would train on alone and hold the GPUs: they end with it.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from torch.distributed import (
    DistNetworkError,
    DistStoreError,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.distributed_c10d import _world

from swaft.distributed import is_first_rank
from swaft.errors import NoiseError, SwaftError
from swaft.training.launch.interruption import Interrupted

EXIT_CODE = 75
"""EX_TEMPFAIL: the run has not finished; started again, it resumes."""
CTRL_C = 128 + signal.SIGINT
"""What a shell reports for a program that Ctrl-C has ended."""


GRACE_S = 5.0
LAUNCHERS = {
    *("accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"),
    "deepspeed.launcher.launch",
}
"""Words that identify the command line of a process that starts ranks, besides `accelerate launch`."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl that sends a process a signal when its parent ends."""
TAG = 7_305_881
"""Tag of a message that nobody sends."""
LOST = {
    "did not answer within train.ddp_timeout seconds": (
        r"gloo/transport/[^\n]*timed? ?out[^\n]*|Application timeout caused pair closure",
        r"timed? ?out[^\n]*",
    ),
    "are gone": (
        r"gloo/transport/[^\n]*(?:connection (?:closed|reset) by peer|socket (?:unexpectedly )?closed|"
        r"broken pipe|no route to host|unreachable)[^\n]*",
        r"connection (?:closed|reset) by peer|broken pipe",
    ),
}
"""What happened to other ranks: gloo's messages about its connections, and torch's about the rendezvous
(MASTER_ADDR). Gloo says "Application timeout" if a rank that did not answer is contacted again."""


def run_and_report(run: Callable[[], None]) -> int:
    """Run a recipe and return its exit code, with errors from `swaft.errors` and lost ranks reported in words.

    An error that all ranks agree on is reported by the main process only. Another rank waits a moment before it
    reports its own: if the main process failed too, the launcher has ended this rank by then, and a rank
    that failed alone still reports. Lost ranks are listed (`roll_call`). With SWAFT_TRACEBACK=1 every message comes
    with its traceback.

    Args:
        run: the recipe. Any other exception passes through with its traceback.

    Returns:
        0, 1 after an error, `EXIT_CODE` if the run was asked to end and can resume, or `CTRL_C`.
    """
    end_with_launcher()
    try:
        run()
    except Interrupted:
        if is_first_rank():
            sys.stderr.write(
                "the run was asked to end (SIGTERM or SIGUSR1); it has left a checkpoint, and resumes from there "
                "when it is started again with train.resume_from_checkpoint=auto (the default)\n"
            )
        return EXIT_CODE
    except KeyboardInterrupt as error:
        # The launcher may end before this process has cleaned up; ignore its SIGTERM, so that it can finish.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _trace(error)
        if is_first_rank():
            sys.stderr.write("; ".join(["interrupted", *getattr(error, "__notes__", ())]) + "\n")
        return CTRL_C
    except (SwaftError, RuntimeError) as error:
        lost = lost_ranks(error)
        if lost is None and not isinstance(error, SwaftError):
            raise
        _trace(error)
        notes = () if lost else getattr(error, "__notes__", ())
        message = (lost or message_of(error)) + "".join(f"\n  ({note})" for note in notes)
        if is_first_rank():
            _report(message)
        if lost:
            absent = roll_call(GRACE_S)
            _report(message, absent) if is_first_rank() else _report(f"{message}\n  ({absent})")
        elif not is_first_rank():
            time.sleep(GRACE_S)
            _report(message)
        return 1
    return 0


def message_of(error: BaseException) -> str:
    """Return an error's message; if it is about an objective, it starts with the section of its settings."""
    return f"section noise: {error}" if isinstance(error, NoiseError) else str(error)


def leave(code: int) -> NoReturn:
    """End the process with ``code``.

    With several ranks, Python's own teardown is skipped. After a failure it would destroy the process group, which
    can wait for ranks that are gone; after a normal end it can abort the process, if one of gloo's threads releases
    a tensor during interpreter shutdown. Functions registered with `atexit` are called, unless the run has failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if code in (0, EXIT_CODE, CTRL_C):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def lost_ranks(error: BaseException | None) -> str | None:
    """Return a message that other ranks are gone, if that is what caused an error; else None.

    Only gloo's messages about its connections count, and torch's about the rendezvous.
    Under NCCL there is no such error: torch's watchdog writes its own and ends the process.
    """
    while (each := error) is not None:
        meeting = isinstance(each, (DistNetworkError, DistStoreError))
        for what, patterns in LOST.items():
            if found := re.search(patterns[meeting], str(each), re.IGNORECASE):
                return (
                    f"other ranks {what}. Either a process of this run has ended, or the network to its machine is "
                    "cut. Look first at the last output of the other machines' processes and whether one was "
                    "killed (memory, the scheduler), then at the network. What has been saved is intact; start the "
                    "run again.\n"
                    f"  ({str(each).splitlines()[0] if meeting else found[0]})"
                )
        error = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return None


def _trace(error: BaseException) -> None:
    if os.environ.get("SWAFT_TRACEBACK") == "1":
        traceback.print_exception(error)


def _report(*messages: str) -> None:
    """Print the last of some messages, and put all where torchrun looks for this rank's final error."""
    where = "" if is_first_rank() else f" on rank {os.environ['RANK']}"
    sys.stderr.write(f"error{where}: {messages[-1]}\n")
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # torchrun draws a box as wide as the longest line.
        every = "\n".join(messages).splitlines()
        lines = [textwrap.fill(line, 100, subsequent_indent="  ") for line in every]
        content = {"message": "\n".join(lines), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": content}))


def roll_call(wait_s: float) -> str:
    """Announce this rank, wait for the others to do the same, and return which did not.

    Every rank that notices a loss calls this, and closes its connections first, so that ranks waiting for it
    notice too. Under NCCL they may not: a rank that is not listed is alive, but one that is may just be waiting.
    The rendezvous store (MASTER_ADDR, MASTER_PORT) is queried over a separate connection, because a waiting thread
    may be using that of the process group, and in a separate thread, because a store that has accepted a connection
    may never answer.

    Args:
        wait_s: seconds to wait for the others; the call takes at most about three times as long.
    """
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(_ask_who_is_there(wait_s)), daemon=True)
    asking.start()
    asking.join(3 * wait_s)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return found[0] if found else f"{place}, where the ranks met, does not answer"


def _ask_who_is_there(wait_s: float) -> str:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A launcher that restarts the ranks keeps its store, and the keys in it.
    there = f"swaft/there/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
    began = time.monotonic()
    with suppress(Exception):  # whatever torch raises for groups that no longer exist
        _close_connections()
    try:
        store = TCPStore(host, port, timeout=timedelta(seconds=wait_s), wait_for_workers=False)
        store.set(f"{there}{rank}", "")
        time.sleep(max(0.0, began + wait_s - time.monotonic()))
        absent = [str(other) for other in range(world_size) if not store.check([f"{there}{other}"])]
    except RuntimeError:  # from torch: there is no connection, or it is gone
        return f"{host}:{port}, where the ranks met, does not answer: look first at the machine of rank 0"
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(wait_s)  # the store is in this process, and others may still be querying it
    if not absent:
        return f"all {world_size} ranks are there, so it is the network between them"
    return f"of {world_size} ranks these said nothing for {wait_s:g} s: {', '.join(absent)}"


def _close_connections() -> None:
    """Close this rank's gloo connections, so that ranks stop waiting for it.

    Gloo closes all connections of a group if a message does not arrive in time.
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


def launch_command() -> list[str]:
    """Return the command that started this run: the launcher's if one started the ranks, else this process's."""
    started_by = [_command_line(parent) for parent in psutil.Process().parents()]
    launchers = [words for words in started_by if _is_launcher(words)]
    return launchers[-1] if launchers else sys.orig_argv


def end_with_launcher() -> None:
    """Make the system send this process SIGTERM when the launcher that started it ends.

    Some signals end a launcher without being forwarded: SIGTERM for accelerate with one process, SIGUSR1 for
    torchrun, SIGKILL for all. Its ranks would train on alone and hold the GPUs. If the parent is not a launcher
    but, say, a shell, nothing is done: the end of a shell is no reason to end.
    """
    parent = psutil.Process().parent()
    if sys.platform != "linux" or parent is None or not _is_launcher(_command_line(parent)):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != parent.pid:  # the launcher ended before the call above
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(words: list[str]) -> bool:
    """Whether a command line is a launcher's: its name is among the first words, after Python and its options."""
    names = [Path(word).name for word in words[:8]]
    return bool(LAUNCHERS & {*names}) or any(
        first in ("accelerate", "accelerate.commands.accelerate_cli") and second == "launch"
        for first, second in pairwise(names)
    )


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended, or belongs to another user
        return []
