"""Means over windows of the run that are chosen after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from swaft.averaging.rules.base import DEFAULT, Plan, Readout, Update, resolve_start, spaced
from swaft.errors import AveragingError, ConfigError
from swaft.options import Count, Range, StepOrShare


@dataclass(frozen=True, kw_only=True)
class WindowsPlan(Plan):
    """One running mean per block: of ``N`` members, block ``b`` holds ``b N // B`` to ``(b + 1) N // B - 1``."""

    @property
    def blocks(self) -> int:
        """Blocks of the run, ``B``: at most one per member."""
        return min(self.rule.blocks, self.num_members)

    @property
    def lanes(self) -> tuple[bool, ...]:
        """One running mean per block."""
        return (True,) * self.blocks

    def updates(self, n: int) -> tuple[Update, ...]:
        """The member enters the plain mean of its block."""
        self.refuse_surplus(n)
        block = self._block_of(n)
        return (Update(block, 1.0 / (n + 1 - self._first_of(block))),)

    def finished(self, n: int) -> tuple[int, ...]:
        """The block whose last member ``n`` is."""
        block = self._block_of(n)
        return (block,) if n + 1 == self._first_of(block + 1) else ()

    def readout(self, num_members: int, chosen: Readout = DEFAULT) -> dict[int, float]:
        """The plain mean of the members with ``start <= step <= end``, see :meth:`window`.

        Raises:
            AveragingError: the window is empty, cuts a block, or extends beyond what the run keeps.
        """
        chosen.refuse_all_but("start", "end")
        window = self.window(num_members, chosen.start, chosen.end)
        held = {
            block: min(self._first_of(block + 1), window.stop) - self._first_of(block)
            for block in range(self._block_of(window.start), self._block_of(window.stop - 1) + 1)
        }
        return {block: count / len(window) for block, count in held.items()}

    def resolved(self, num_members: int, chosen: Readout) -> tuple[Readout, range]:
        """A window by the steps of its first and its last member."""
        members = self.window(num_members, chosen.start, chosen.end)
        return replace(chosen, start=self.step_of(members[0]), end=self.step_of(members[-1])), members

    def boundaries(self, num_members: int) -> list[tuple[int, int]]:
        """Where windows may start and end: steps of the first and last member of every block so far."""
        firsts = [self._first_of(block) for block in range(self.blocks)]
        return [
            (self.step_of(first), self.step_of(min(self._first_of(block + 1), num_members) - 1))
            for block, first in enumerate(firsts)
            if first < num_members
        ]

    def window(
        self, num_members: int, start: float | int | None = None, end: float | int | None = None
    ) -> range:
        """The members with ``start <= step <= end`` among the first ``num_members``, if they form whole blocks.

        A block that is still being filled counts as whole with the members it has. Steps between two members belong
        to neither, so with ``every > 1`` several steps denote the same boundary.

        Args:
            num_members: members so far, at least 1.
            start: a float is the fraction of the run ``floor(start * total_steps)``, an int the step itself; None:
                the first member.
            end: given the same way; None: the latest member.

        Raises:
            AveragingError: the window is empty, cuts a block, or extends beyond what the run keeps; the message
                gives the nearest boundaries.
        """
        first_step = self.first_step if start is None else self._resolve(start, "start")
        last_step = self.total_steps if end is None else self._resolve(end, "end")
        if first_step < self.first_step:
            raise AveragingError(
                f"the window's start={start} is step {first_step}, but this run keeps weights from step "
                f"{self.first_step} on (the rule's start)"
            )
        if last_step > self.total_steps:
            raise AveragingError(
                f"the window's end={end} is past the last step of the run, {self.total_steps}"
            )
        window = range(self.members_until(first_step - 1), min(self.members_until(last_step), num_members))
        if not window:
            raise AveragingError(
                f"the window from start={start} to end={end} holds none of the {num_members} weights of steps "
                f"{self.first_step} to {self.step_of(num_members - 1)} (one every {self.every})"
            )
        boundaries = self.boundaries(num_members)
        begins, ends = zip(*boundaries, strict=True)
        block = self._block_of(window[0])
        self._refuse_cut("begin", self.step_of(window[0]), begins[block : block + 2])
        block = self._block_of(window[-1])
        self._refuse_cut("end", self.step_of(window[-1]), ends[max(block - 1, 0) : block + 1])
        return window

    def _refuse_cut(self, verb: str, step: int, nearest: Sequence[int]) -> None:
        if step not in nearest:
            raise AveragingError(
                f"a window that {verb}s at step {step} cuts a block of averaged weights; the nearest that can "
                f"{verb} do so at step {' or '.join(map(str, nearest))} (see `plan.boundaries`)"
            )

    def _resolve(self, value: float | int, name: str) -> int:
        try:
            return resolve_start(value, self.total_steps, name=f"the window's {name}")
        except ConfigError as error:
            raise AveragingError(error.problems[0]) from None

    def _first_of(self, block: int) -> int:
        return block * self.num_members // self.blocks

    def _block_of(self, n: int) -> int:
        return ((n + 1) * self.blocks - 1) // self.num_members


@dataclass(frozen=True)
class Windows:
    """The plain mean over a window of the run, chosen after training among the windows of whole blocks.

    The run keeps the mean of every block; a window's mean is the mean of its blocks, weighted by their members.
    `search_windows` finds the best window on validation data. A window that ends with the run equals `SWA` with the
    same start.
    """

    blocks: Annotated[int, Range(low=2)] = 32
    """Number of blocks whose means are kept, at 6 bytes per element each, with member counts as equal as possible;
    fewer if there are fewer members."""
    start: StepOrShare = 0
    """First member. A float is a fraction of the run, an int a step; 0 is the weights before training."""
    every: Count = 1
    """Optimizer steps between two members."""

    def plan(self, total_steps: int) -> WindowsPlan:
        """The events of a run, see `Rule.plan`."""
        return WindowsPlan(**spaced(self, total_steps))
