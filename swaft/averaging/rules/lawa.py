"""Latest weight averaging: the mean of the last few members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from swaft.averaging.rules.base import DEFAULT, Plan, Readout, Update, spaced
from swaft.errors import ConfigError
from swaft.options import Count, Range, StepOrShare


@dataclass(frozen=True, kw_only=True)
class LAWAPlan(Plan):
    """A ring of copies: member ``n`` takes the place of member ``n - last``."""

    last: int
    """Members in the mean."""

    @property
    def lanes(self) -> tuple[bool, ...]:
        """One copy a place of the ring."""
        return (False,) * self.last

    def updates(self, n: int) -> tuple[Update, ...]:
        """The member is copied over the oldest."""
        return (Update(n % self.last, 1.0),)

    def readout(self, num_members: int, chosen: Readout = DEFAULT) -> dict[int, float]:
        """The mean of those places that are filled."""
        chosen.refuse_all_but()
        filled = min(num_members, self.last)
        return dict.fromkeys(range(filled), 1.0 / filled)


@dataclass(frozen=True)
class LAWA:
    """Latest weight averaging: the plain mean of the last ``last`` members.

    Kaddour 2022 (arXiv 2209.14981), with the ends of epochs as members; Sanyal et al. 2024 (arXiv 2306.03241) for
    language models, with 5 checkpoints far apart and a high learning rate.
    """

    last: Annotated[int, Range(low=2)] = 10
    """Members in the mean, each kept whole at 4 bytes an element."""
    start: StepOrShare = 0
    """First member. A float is a fraction of the run, an int a step; 0 is the weights before training."""
    every: Count = 1
    """Optimizer steps between two members."""

    def plan(self, total_steps: int) -> LAWAPlan:
        """The events of a run, see `Rule.plan`; it has to have at least `last` members."""
        plan = LAWAPlan(**spaced(self, total_steps), last=self.last)
        if plan.num_members < self.last:
            raise ConfigError(
                f"last is {self.last}, but start={self.start} with every={self.every} makes {plan.num_members} "
                f"members in {total_steps} steps; lower one of the three"
            )
        return plan
