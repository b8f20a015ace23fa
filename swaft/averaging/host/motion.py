"""Whether the weights change at all, as the averages see them: a silent no-op is the worst fault there is."""

from __future__ import annotations

from collections.abc import Sequence

from swaft.averaging import native
from swaft.averaging.host.crew import Crew
from swaft.averaging.host.lanes import Table

WORD = 1 << 64


class Motion:
    """Compares the bits of the members with those of the first, until one differs.

    Args:
        crew: does the sums.
    """

    def __init__(self, crew: Crew):
        self.seen = False
        self.members = 0
        self._crew = crew
        self._first: int | None = None
        self._sum = 0

    def take(self, tables: Sequence[Table]) -> None:
        """Look at a piece of a member."""
        if not self.seen:
            self._sum += sum(int(part) for part in self._crew.run(native.checksum, tables))

    def end(self) -> None:
        """The member is complete."""
        self.members += 1
        if self._first is None:
            self._first = self._sum % WORD
        self.seen = self.seen or self._sum % WORD != self._first
        self._sum = 0

    def restart(self, *, moved: bool) -> None:
        """Begin anew, as after members of which it is known whether they differed."""
        self.seen, self.members, self._first = moved, 0, None
