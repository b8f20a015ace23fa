"""Ends a recipe that failed on purpose: one clear message, a non-zero exit on every rank, no traceback."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistNetworkError, DistStoreError

from swaft.errors import SwaftError
from swaft.training.launch.interruption import EXIT_CODE, Interrupted
from swaft.training.launch.roll_call import roll_call
from swaft.training.launch.started_by import end_with_launcher

GRACE_S = 5.0

SILENT = re.compile(
    r"gloo/transport/[^\n]*timed? ?out[^\n]*|Application timeout caused pair closure", re.IGNORECASE
)
"""What gloo says when another rank does not answer in time; and when one did not before, and is asked again."""
GONE = re.compile(
    r"gloo/transport/[^\n]*(?:connection (?:closed|reset) by peer|socket (?:unexpectedly )?closed|broken pipe|"
    r"no route to host|unreachable)[^\n]*",
    re.IGNORECASE,
)
"""What gloo says when its connection to another rank is gone."""
MEETING_SILENT = re.compile(r"timed? ?out[^\n]*", re.IGNORECASE)
"""What torch says when other ranks do not come to where all meet first (MASTER_ADDR)."""
MEETING_GONE = re.compile(r"connection (?:closed|reset) by peer|broken pipe", re.IGNORECASE)
"""What torch says when one of those that came has gone again."""


def run_and_report(run: Callable[[], None]) -> int:
    """Run a recipe and return its exit code, with errors of `swaft.errors` and lost ranks told in words.

    An error that all ranks agree on is told by the main process only. Another rank waits a moment before it
    tells its own: where the main process failed too, the launcher has ended this rank by then, and a rank
    that failed alone is not silent. Of lost ranks it is told which (`roll_call`). With SWAFT_TRACEBACK=1 every
    message comes with the way to it.

    Args:
        run: the recipe. Any other exception passes through with its traceback.

    Returns:
        0, 1 after an error, or `EXIT_CODE` where the run was asked to end and can go on.
    """
    end_with_launcher()
    try:
        run()
    except Interrupted:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(
                "the run was asked to end (SIGTERM or SIGUSR1); it has left a checkpoint, and goes on from there "
                "when it is started again\n"
            )
        return EXIT_CODE
    except (
        KeyboardInterrupt
    ):  # the launcher may end before this process has tidied up, which is to finish that
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except (SwaftError, RuntimeError) as error:
        lost = lost_ranks(error)
        message = lost or (_words(error) if isinstance(error, SwaftError) else None)
        if message is None:
            raise
        if os.environ.get("SWAFT_TRACEBACK") == "1":
            traceback.print_exception(error)
        is_first = os.environ.get("RANK", "0") == "0"
        if is_first:
            _tell(message)
        if lost:
            absent = roll_call(GRACE_S)
            _tell(message, absent) if is_first else _tell(f"{message}\n  ({absent})")
        elif not is_first:
            time.sleep(GRACE_S)
            _tell(message)
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End the process with ``code``.

    One rank of several does not go through Python's own tear-down. After a failure that destroys the process
    group, which can wait for ranks that are gone; after a good end it can abort the process, where one of gloo's
    threads lets go of a tensor while the interpreter is being taken down. What is registered with `atexit` is
    called, unless the run has failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if code in (0, EXIT_CODE):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def lost_ranks(error: BaseException) -> str | None:
    """Return in words that other ranks are gone, where that is what an error comes from; else None.

    Only what gloo says of its connections counts, and what torch says of the place where all ranks meet first.
    Under NCCL there is no such error to be told: torch's watchdog writes its own and ends the process.
    """
    for each in _chain(error):
        meeting = isinstance(each, (DistNetworkError, DistStoreError))
        silent = (MEETING_SILENT if meeting else SILENT).search(str(each))
        found = silent or (MEETING_GONE if meeting else GONE).search(str(each))
        if found:
            what = "did not answer within train.ddp_timeout seconds" if silent else "are gone"
            return (
                f"other ranks {what}. Either a process of this run has ended, or the network to its machine is "
                "cut. Look first at what the other machines' processes said last and whether one was killed "
                "(memory, the scheduler), then at the network. What has been saved is whole; start the run "
                "again.\n"
                f"  ({str(each).splitlines()[0] if meeting else found[0]})"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _words(error: SwaftError) -> str:
    return str(error) + "".join(f"\n  ({note})" for note in getattr(error, "__notes__", ()))


def _tell(*messages: str) -> None:
    """Say the last of some messages, and leave all where torchrun looks for what to print last of this rank."""
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"{'error' if rank == '0' else f'error on rank {rank}'}: {messages[-1]}\n")
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # torchrun draws a box as wide as the longest line.
        every = "\n".join(messages).splitlines()
        lines = [textwrap.fill(line, 100, subsequent_indent="  ") for line in every]
        told = {"message": "\n".join(lines), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": told}))
