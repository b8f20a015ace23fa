"""Ends a run that is asked to end: the ranks agree on it between two batches, so that all of them can save.

A handler sets a flag and does nothing else. Whether any rank has it set is asked of all ranks at the same places:
between optimizer steps, and between the batches of an evaluation.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from swaft.distributed import shared_ranks
from swaft.errors import SwaftError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they end a job: torchrun hands on SIGTERM, and SLURM what `--signal` says."""

EXIT_CODE = 75
"""EX_TEMPFAIL: the run is not over; started again, it resumes."""


class Interrupted(Exception):
    """The run was asked to end, on every rank at the same place."""


class Interruption:
    """Whether the run was asked to end, from entering this context on."""

    def __init__(self) -> None:
        self._ranks, self._asked = shared_ranks(), False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Begin to listen. Signals reach the main thread only; in any other there is nothing to listen to."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the signals to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, failure: SwaftError | None = None) -> None:
        """Raise where any rank was asked to end, or cannot continue (collective, one message).

        Args:
            failure: why this rank cannot continue.

        Raises:
            Interrupted: on every rank.
            SwaftError: likewise, the failure of the first rank that has one.
        """
        failed, asked = self._ranks.sum([failure is not None, self._asked])
        if failed:
            self._ranks.raise_together(failure)
        if asked:
            raise Interrupted

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def leave_signals_to_the_rank(worker: int) -> None:
    """Have a process that loads batches outlive the signals, which launchers send to all processes of a rank.

    To be given to a `DataLoader` as ``worker_init_fn``: torch's own handler ends a worker.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class InterruptibleLoader:
    """A loader that asks before each batch whether the run is to end.

    Args:
        loader: with as many batches on every rank.
        interruption: of the run.
    """

    def __init__(self, loader: Any, interruption: Interruption):
        self._loader, self._interruption = loader, interruption

    def __iter__(self) -> Iterator[Any]:
        """Yield the loader's batches; raise `Interrupted` on every rank before one of them (collective)."""
        for batch in self._loader:
            self._interruption.check()
            yield batch
