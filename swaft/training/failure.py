"""Ends a recipe that failed on purpose: one clear message, a non-zero exit on every rank, no traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch

from swaft.errors import SwaftError

GRACE_S = 5.0


def run_and_report(run: Callable[[], None]) -> int:
    """Run a recipe and return its exit code, with errors of `swaft.errors` told in words.

    An error that all ranks agree on is told by the main process only. Another rank waits a moment before it
    tells its own: where the main process failed too, the launcher has ended this rank by then, and a rank
    that failed alone is not silent.

    Args:
        run: the recipe. Any other exception passes through with its traceback.

    Returns:
        0, or 1 after an error.
    """
    try:
        run()
    except SwaftError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(GRACE_S)
        notes = "".join(f"\n  ({note})" for note in getattr(error, "__notes__", ()))
        sys.stderr.write(f"{'error' if rank == '0' else f'error on rank {rank}'}: {error}{notes}\n")
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End the process with ``code``.

    After a failure among several ranks Python's own tear-down is skipped: it destroys the process group,
    which can wait for ranks that are gone, and a failed run must not hang.
    """
    if code and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
