"""Which weights ZeRO-3 holds whole at each moment: fetched, fetched ahead, and let go.

Follows `PartitionedParameterCoordinator` of DeepSpeed 0.19.8. A single parameter is gathered into a buffer of its
own. Several are gathered into one, and copied out of it when the first of them is needed; the buffer goes when the
last has been.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from swaft.planning.memory import Run
from swaft.planning.trace import Moment


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """What ZeRO-3 is told about gathering; all numbers are elements."""

    prefetch_numel: int
    max_live_numel: int
    max_reuse_numel: int
    persistent: frozenset[int] = frozenset()
    """Parameters that stay whole always, and are not counted here."""


@dataclass(eq=False)
class _Fetch:
    """Parameters that are gathered together."""

    pending: set[int]
    nbytes: int
    copied: bool = False


class GatheredWeights:
    """The gathered weights of one rank, moment by moment.

    Args:
        run: how the model is trained.
        moments: of one micro-batch.
        gathering: what ZeRO-3 is told.
        learnt: whether the order of the modules is known. It is after two steps; before, nothing is fetched ahead,
            and each weight is let go as soon as its module has ended.
    """

    def __init__(self, run: Run, moments: Sequence[Moment], gathering: Gathering, *, learnt: bool):
        self._run, self._moments, self._gathering, self._learnt = run, moments, gathering, learnt
        entered = [position for position, moment in enumerate(moments) if moment.kind == "enter"]
        self._step_at = {position: step for step, position in enumerate(entered)}
        self._uses = [moments[position].parameters for position in entered]
        self._steps_of: dict[int, list[int]] = defaultdict(list)
        for step, use in enumerate(self._uses):
            for number in use:
                self._steps_of[number].append(step)
        numels = (sum(run.weights[number].numel for number in use) for use in self._uses)
        self._traversed = [0, *accumulate(numels)]
        self._queue = deque((number, step) for step, use in enumerate(self._uses) for number in use)
        self._fetched_for = dict.fromkeys(range(len(run.weights)), -1)
        self._step = 0
        self._available: set[int] = set(gathering.persistent)
        self._fetches: dict[int, _Fetch] = {}
        self._live_numel = 0
        self.held = 0
        """Bytes now."""

    def enter(self, position: int) -> tuple[int, int]:
        """Fetch what a module needs, and what is needed next.

        Args:
            position: of its moment.

        Returns:
            The most bytes on the way, and the bytes of the largest exchange.
        """
        self._step = self._step_at[position]
        needed = self._uses[self._step]
        exchanged = self._fetch([number for number in needed if self._is_away(number)])
        most = max([self.held, *(self._wait(number) for number in needed if number in self._fetches)])
        if self._learnt:
            exchanged = max(exchanged, self._fetch(self._ahead(needed)))
        self._step += 1
        return max(most, self.held), exchanged

    def leave(self, position: int) -> None:
        """Let go of a module's weights, those apart that are used again soon."""
        for number in self._moments[position].parameters:
            if number in self._available - self._gathering.persistent and not self._used_soon(number):
                self._available.discard(number)
                self._live_numel -= self._run.weights[number].numel
                self.held -= self._run.weights[number].nbytes

    def _used_soon(self, number: int) -> bool:
        if not self._learnt:
            return False
        if self._fetched_for[number] > self._step:
            return True
        steps = self._steps_of[number]
        following = bisect_left(steps, self._step)
        if following == len(steps):
            return False
        between = self._traversed[steps[following]] - self._traversed[self._step]
        return between < self._gathering.max_reuse_numel

    def _ahead(self, needed: Sequence[int]) -> list[int]:
        """Choose what to fetch ahead: what comes next in the order, until the bucket is full."""
        used = {number for number in needed if self._fetched_for[number] < self._step}
        while self._queue and used:
            number, step = self._queue.popleft()
            self._fetched_for[number] = step
            used.discard(number)
        room = min(self._gathering.max_live_numel - self._live_numel, self._gathering.prefetch_numel)
        ahead: dict[int, None] = {}
        numel = 0
        while self._queue and numel < room:
            number, step = self._queue.popleft()
            self._fetched_for[number] = max(self._fetched_for[number], step)
            if self._is_away(number) and number not in ahead:
                ahead[number] = None
                numel += self._run.weights[number].numel
        return list(ahead)

    def _is_away(self, number: int) -> bool:
        return number not in self._available and number not in self._fetches

    def _fetch(self, numbers: Sequence[int]) -> int:
        """Begin to gather some parameters together; returns the bytes exchanged."""
        if not numbers:
            return 0
        nbytes = sum(self._padded(number) for number in numbers)
        self.held += nbytes
        self._live_numel += sum(self._run.weights[number].numel for number in numbers)
        self._fetches.update(dict.fromkeys(numbers, _Fetch(set(numbers), nbytes)))
        return nbytes if self._run.world_size > 1 else 0

    def _wait(self, number: int) -> int:
        """Finish the gathering of a parameter; returns the bytes meanwhile."""
        fetch = self._fetches.pop(number)
        if not fetch.copied:
            self._available |= fetch.pending
            if len(fetch.pending) == 1:
                self.held += self._run.weights[number].nbytes - fetch.nbytes
                return self.held
            fetch.copied = True
            self.held += sum(self._run.weights[each].nbytes for each in fetch.pending)
        meanwhile = self.held
        fetch.pending.discard(number)
        if not fetch.pending:
            self.held -= fetch.nbytes
        return meanwhile

    def _padded(self, number: int) -> int:
        weight, ranks = self._run.weights[number], self._run.world_size
        return -(-weight.numel // ranks) * ranks * weight.itemsize
