"""Agreement between ranks: small messages over gloo, separate from the training's own collectives.

The averages live in host memory, and a message about an error must get through while the accelerator's communicator
is busy or broken. So swaft keeps its own gloo group and never interferes with the order of NCCL's operations.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from swaft.errors import StateError, SwaftError

ARRIVAL_TIMEOUT_S = 60.0
"""Seconds that ranks wait for each other after an error before they give up on the missing ones; less if the
training's own time limit is shorter."""
PATIENCE = timedelta(hours=6)
"""How long ranks wait for one that writes a model alone: on a slow disk, this exceeds a collective's time limit."""


def is_first_rank() -> bool:
    """Whether this is rank 0 of those that a launcher has started, or the only process; known before they meet."""
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Whether this process is one of a group that trains together."""
    return dist.is_available() and dist.is_initialized()


def current_rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


_SHARED: tuple[object, Ranks] | None = None


def shared_ranks() -> Ranks:
    """The ranks of this process's default group, created once (collective the first time): groups cost threads."""
    global _SHARED
    world = dist.group.WORLD if is_distributed() else None
    if _SHARED is None or _SHARED[0] is not world:
        _SHARED = (world, Ranks())
    return _SHARED[1]


class Ranks:
    """The processes that train together, and a gloo group between them (none if there is only one process).

    Creating it is collective: every rank must do so, in the same order relative to its other groups.
    """

    def __init__(self) -> None:
        self.rank = current_rank()
        self.world_size = dist.get_world_size() if is_distributed() else 1
        self._group: Any = None
        self._arrivals: Any = None
        self._patient: Any = None
        if self.world_size > 1:
            # Each group keeps a socket per rank open, so the usual 1024 descriptors are too few for 250 ranks.
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            with suppress(ValueError):  # macOS refuses its own "unlimited"
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            self._group = _gloo_group()
            # The time limit of a gloo operation is that of its group, so waiting for a rank that may never arrive
            # needs a separate group.
            self._arrivals = _gloo_group(at_most=timedelta(seconds=ARRIVAL_TIMEOUT_S))
            # A lost rank is still noticed at once. Made now, so that a failure comes now, not at the export.
            self._patient = _gloo_group(at_least=PATIENCE)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def gather(self, value: Any, *, patiently: bool = False) -> list[Any]:
        """The values of all ranks, by rank, on every rank (collective; small picklable values).

        With ``patiently``, a rank may take up to ``PATIENCE`` to arrive.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _explained():
            dist.all_gather_object(values, value, group=self._patient if patiently else self._group)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over ranks in float64, the same on every rank (collective, one message)."""
        return Channel(self._group).sum(values)

    def channel(self) -> Channel:
        """A separate channel between the ranks, for use by another thread (creating it is collective)."""
        return Channel(None if self._group is None else _gloo_group())

    def raise_together(self, error: SwaftError | None, *, patiently: bool = False) -> None:
        """Raise the error of the lowest failing rank on every rank, so none continues alone and none is left
        waiting.

        Collective. All ranks raise the same type with the same message, with a note that names the failing rank.
        With ``patiently`` a rank may take up to ``PATIENCE`` to come here.
        """
        errors = self.gather(error, patiently=patiently)
        found = [(rank, each) for rank, each in enumerate(errors) if each is not None]
        if not found:
            return
        rank, first = found[0]
        if rank == self.rank and error is not None:
            first = error  # keeps its cause, which is not transferred
        if self.world_size > 1:
            first.add_note(f"found on rank {rank} of {self.world_size}")
        raise first

    @contextmanager
    def together(self, fault: str | None = None, *, patiently: bool = False) -> Iterator[None]:
        """Context that raises a `SwaftError` of any rank on all of them, at its end (collective).

        The body must make no collective calls, except ones that a failing rank makes, too.

        Args:
            fault: message for any other exception from the body, such as "FILE could not be written"; the exception
                becomes a `StateError` with this text. None: other exceptions pass through on their rank.
            patiently: a rank may take up to ``PATIENCE`` for the body.
        """
        error = None
        try:
            yield
        except SwaftError as found:
            error = found
        except Exception as found:  # whatever it is, the other ranks are waiting
            if fault is None:
                raise
            error = StateError(f"{fault}: {_reason(found)}")
            error.__cause__ = found
        self.raise_together(error, patiently=patiently)

    def send(self, tensor: torch.Tensor, *, to: int) -> None:
        """Send a host tensor to rank ``to``, which may take up to ``PATIENCE`` to ask for it."""
        with _explained():
            dist.send(tensor, dst=to, group=self._patient)

    def receive(self, tensor: torch.Tensor, *, source: int) -> None:
        """Receive a host tensor from rank ``source``, which may take up to ``PATIENCE``, into ``tensor``."""
        with _explained():
            dist.recv(tensor, src=source, group=self._patient)

    def all_arrive(self) -> bool:
        """Whether every rank reaches this point within ``ARRIVAL_TIMEOUT_S``; for error handling.

        Collective, but it also works if some ranks never call it: if others are waiting elsewhere, this returns
        False.
        """
        if self._arrivals is None:
            return True
        try:
            dist.barrier(group=self._arrivals)
        except RuntimeError:
            return False
        return True


class Channel:
    """Sums over a separate group: messages of two threads in one group could arrive in another order elsewhere.

    Args:
        group: a gloo group; None in one process.
    """

    def __init__(self, group: Any):
        self._group = group

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over ranks in float64, the same on every rank (collective, one message)."""
        if self._group is None:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64, device="cpu")
        with _explained():
            dist.all_reduce(message, group=self._group)
        return message.tolist()

    def close(self) -> None:
        """Release the group's threads and sockets."""
        if self._group is not None and dist.is_initialized():
            with suppress(ValueError):  # it has ended with the processes' group, and there is a new one
                dist.destroy_process_group(self._group)
        self._group = None


@contextmanager
def _explained() -> Iterator[None]:
    """Context that adds to gloo's error what the user may have to change."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            "swaft waited here for another rank, which has ended or is somewhere else; if no other error came "
            "first, expected every rank to make the same calls of the averager, in the same order (none of them "
            "inside `if accelerator.is_main_process:`)"
        )
        raise


def _gloo_group(*, at_least: timedelta = timedelta(), at_most: timedelta = timedelta.max) -> Any:
    """A gloo group of all ranks, with the time limit of the training's own group (creating it is collective)."""
    # Without an explicit limit, torch gives a group 30 minutes, whatever the limit of the default group.
    world: Any = dist.group.WORLD
    limit: timedelta = world._get_backend(world._device_types[0]).options._timeout
    return dist.new_group(backend="gloo", timeout=min(max(limit, at_least), at_most))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
