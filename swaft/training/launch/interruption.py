"""Ends a run that is asked to end between two batches, where the ranks agree on it, so that all of them can save.

The signal handler only sets a flag; the ranks ask each other whether any has it set, all at the same places:
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
"""Signals that schedulers send before they end a job: torchrun forwards SIGTERM, SLURM sends its `--signal`."""


class Interrupted(Exception):
    """The run was asked to end, on every rank at the same place."""


class Interruption:
    """Context that records whether the run has been asked to end."""

    def __init__(self) -> None:
        self._ranks, self._asked = shared_ranks(), False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Install the signal handlers. Only the main thread gets signals, so in others this does nothing."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, failure: SwaftError | None = None) -> None:
        """Raise if any rank was asked to end, or cannot continue (collective, one message).

        Args:
            failure: why this rank cannot continue.

        Raises:
            Interrupted: on every rank.
            SwaftError: the failure of the first rank that has one; on every rank.
        """
        failed, asked = self._ranks.sum([failure is not None, self._asked])
        if failed:
            self._ranks.raise_together(failure)
        if asked:
            raise Interrupted

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def leave_signals_to_the_rank(worker: int) -> None:
    """Make a data loader worker ignore the signals, which launchers send to all processes of a rank.

    For a `DataLoader`'s ``worker_init_fn``: torch's own handler ends a worker.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class InterruptibleLoader:
    """A loader that checks before each batch whether the run is to end.

    Args:
        loader: a loader with equally many batches on every rank.
        interruption: the run's interruption.
    """

    def __init__(self, loader: Any, interruption: Interruption):
        self._loader, self._interruption = loader, interruption

    def __iter__(self) -> Iterator[Any]:
        """Yield the loader's batches; raise `Interrupted` on every rank before one of them (collective)."""
        for batch in self._loader:
            self._interruption.check()
            yield batch
