"""The launcher that started this process: what its command was, and that this process ends with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path

import psutil

LAUNCHERS = {
    "accelerate-launch",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
    "deepspeed.launcher.launch",
}
"""Words by which the command line of a process that starts ranks is known; `accelerate launch` is another."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: which signal to get when the parent ends."""


def launch_command() -> list[str]:
    """The command that started this run: that of the launcher where one started the ranks, else this process's."""
    started_by = [_command_line(parent) for parent in psutil.Process().parents()]
    launchers = [words for words in started_by if _is_launcher(words)]
    return launchers[-1] if launchers else sys.orig_argv


def end_with_launcher() -> None:
    """Have the system ask this process to end (SIGTERM) when the launcher that started it does.

    A launcher ends at signals that it does not hand on: accelerate with one process at SIGTERM, torchrun at
    SIGUSR1, all of them at SIGKILL. Its ranks would train on alone and hold the GPUs. Where no launcher is the
    parent, as where a shell is, nothing is done: that a shell ends is no reason to.
    """
    parent = psutil.Process().parent()
    if sys.platform != "linux" or parent is None or not _is_launcher(_command_line(parent)):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != parent.pid:  # it has ended before it could be known
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
    except psutil.Error:  # it has ended, or belongs to somebody else
        return []
