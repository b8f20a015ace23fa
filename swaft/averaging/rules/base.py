"""What a rule says of a run: which optimizer steps are members, and what each does to the lanes. Pure arithmetic.

A *lane* is one vector as long as the weights, kept from the first member on. All a rule can do is move a lane
towards a member or towards another lane,

    lane <- lane + weight * (source - lane),          weight 1 copies,

and say which linear combination of its lanes the average is. So every rule is a table of numbers, and whoever
holds the vectors needs to know no rule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Integral, Real
from typing import Any, Protocol, TypeVar

from swaft.errors import AveragingError, ConfigError
from swaft.fraction import share_of

PlanT = TypeVar("PlanT", bound="Plan")


@dataclass(frozen=True)
class Update:
    """``lane <- lane + weight * (source - lane)``."""

    lane: int
    """Which lane of the rule moves."""
    weight: float
    """Share of the source, in (0, 1]; 1 copies it."""
    source: int | None = None
    """Lane that is taken in, as it is after the updates before this one; None: the member itself."""


SCOPES = ("all", "no_embeddings", "no_head")
"""Which weights an average may stand for; the others stay the last ones."""


@dataclass(frozen=True)
class Readout:
    """Which weights are read out of a run: whose average, what its rule leaves to be chosen afterwards, and how far
    to go from the last weights towards it.

    Raises:
        AveragingError: a blend out of range, or a scope that does not exist.
    """

    rule: str | None = None
    """Name of the rule; None: the first."""
    _: KW_ONLY
    start: float | int | None = None
    """First step of a window (`Windows`): a fraction of the run, or an int for a step; None: the first member."""
    end: float | int | None = None
    """Last step of a window, likewise; None: the latest member."""
    sigma_rel: float | None = None
    """Relative width of the profile (`PowerEMA`); None: the first tracked one."""
    blend: float = 1.0
    """``last + blend * (average - last)``, from -1 to 2: 1 is the average, 0 the last weights, bit for bit."""
    scope: str = "all"
    """Which weights that is done to, one of `SCOPES`; the others stay the last ones."""

    def __post_init__(self) -> None:
        number = isinstance(self.blend, Real) and not isinstance(self.blend, bool)
        if not number or not -1 <= float(self.blend) <= 2:
            raise AveragingError(f"blend is {self.blend!r}, expected a number from -1 to 2; 1 is the average")
        if self.scope not in SCOPES:
            raise AveragingError(f"scope is {self.scope!r}, expected one of {', '.join(SCOPES)}")

    @property
    def choices(self) -> dict[str, Any]:
        """What is chosen besides the rule, by name."""
        return {
            each.name: value
            for each in fields(self)[1:]
            if (value := getattr(self, each.name)) != each.default
        }

    def refuse_all_but(self, *offered: str) -> None:
        """Refuse a choice that a rule does not offer.

        Raises:
            AveragingError: naming it and what is offered.
        """
        for name in self.choices.keys() & {"start", "end", "sigma_rel"}:
            if name not in offered:
                known = " or ".join(offered) or "no choice"
                raise AveragingError(
                    f"this rule's average was asked for by {name!r}; it offers {known} "
                    "(Windows takes start and end, PowerEMA sigma_rel)"
                )


DEFAULT = Readout()
"""The average of the first rule as it is."""


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """The averaging events of one run, and what each does.

    Steps are applied optimizer steps: "step ``t``" is the weights after ``t`` updates, step 0 those before
    training. ``n`` always counts members, from 0.
    """

    first_step: int
    """Step of the first member."""
    every: int
    """Optimizer steps between two members."""
    total_steps: int
    """Optimizer steps of the whole run."""

    def step_of(self, n: int) -> int:
        """Step whose weights are member ``n``."""
        return self.first_step + n * self.every

    def takes(self, step: int) -> bool:
        """Whether the weights after ``step`` updates are a member."""
        return step >= self.first_step and (step - self.first_step) % self.every == 0

    def members_until(self, step: int) -> int:
        """Members among the weights of steps 0 to ``step``."""
        return max(0, (step - self.first_step) // self.every + 1)

    @property
    def num_members(self) -> int:
        """Members in the average at the end of the run."""
        return self.members_until(self.total_steps)

    @property
    @abstractmethod
    def lanes(self) -> tuple[bool, ...]:
        """The lanes: True for a running mean (6 bytes an element), False for plain copies (4 bytes)."""

    @abstractmethod
    def updates(self, n: int) -> tuple[Update, ...]:
        """What member ``n`` does to the lanes, in order. A lane's first update copies (weight 1)."""

    @abstractmethod
    def readout(self, num_members: int, chosen: Readout = DEFAULT) -> dict[int, float]:
        """The average after ``num_members`` members (at least 1): lane to coefficient.

        Raises:
            AveragingError: a choice that the rule does not offer or cannot serve, naming what it can.
        """

    def finished(self, n: int) -> tuple[int, ...]:
        """Lanes that no later member changes, of those that member ``n`` changed: they may move to disk."""
        return ()


@dataclass(frozen=True, kw_only=True)
class RunningMeanPlan(Plan):
    """One lane, a running mean whose members get the weights ``weight(0) = 1, weight(1), ...``."""

    @abstractmethod
    def weight(self, n: int) -> float:
        """Weight of member ``n``."""

    @property
    def lanes(self) -> tuple[bool, ...]:
        """One running mean."""
        return (True,)

    def updates(self, n: int) -> tuple[Update, ...]:
        """Member ``n`` moves the mean by its weight; a weight of 0 leaves it alone."""
        weight = 1.0 if n == 0 else self.weight(n)
        return (Update(0, weight),) if weight > 0 else ()

    def readout(self, num_members: int, chosen: Readout = DEFAULT) -> dict[int, float]:
        """The mean itself."""
        chosen.refuse_all_but()
        return {0: 1.0}


class Rule(Protocol):
    """Anything that can plan the averaging events of a run. Its ``repr`` says all that it is."""

    def plan(self, total_steps: int) -> Plan:
        """The events of a run of ``total_steps`` optimizer steps."""
        ...


def resolve_start(start: float | int, total_steps: int, *, name: str = "averaging.start") -> int:
    """The step a start means: a float is ``floor(start * total_steps)``, exact for the decimal number that was
    written; an int is the step itself.

    Args:
        start: the fraction or step.
        total_steps: optimizer steps of the whole run.
        name: what messages call it.

    Raises:
        ConfigError: a fraction outside [0, 1], or a negative step.
    """
    if not isinstance(start, Real) or isinstance(start, bool):
        raise ConfigError(f"{name} is {start!r}, expected a fraction (0.5) or a step (100)")
    if not isinstance(start, Integral):
        if not 0.0 <= start <= 1.0:
            raise ConfigError(
                f"{name} is the fraction {start}, expected one between 0.0 and 1.0; "
                "write an integer to name a step"
            )
        return math.floor(share_of(total_steps, start))
    if start < 0:
        raise ConfigError(f"{name} is step {start}, expected 0 (the weights before training) or later")
    return int(start)


def checked(plan: PlanT, *, start: float | int) -> PlanT:
    """The plan, once its interval and its number of members make sense.

    Raises:
        ConfigError: otherwise.
    """
    require_whole("every", plan.every, at_least=1)
    if plan.num_members < 2:
        raise ConfigError(
            f"averaging.start={start} with averaging.every={plan.every} puts the first member at step "
            f"{plan.first_step} of {plan.total_steps}, so {plan.num_members} weights would be averaged; "
            "expected at least 2: start earlier (averaging.start), average more often (averaging.every) or "
            "train longer (train.max_steps, train.num_train_epochs)"
        )
    return plan


def require_whole(name: str, value: Any, *, at_least: int) -> None:
    """Refuse an option that is not a whole number of ``at_least`` or more.

    Raises:
        ConfigError: naming it.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"averaging.{name} is {value!r}, expected a whole number, at least {at_least}")


def require_number(name: str, value: Any, *, at_least: float) -> None:
    """Refuse an option that is not a finite number of ``at_least`` or more.

    Raises:
        ConfigError: naming it.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not at_least <= float(value) < math.inf:
        raise ConfigError(f"averaging.{name} is {value!r}, expected a finite number, at least {at_least}")


def refuse_surplus(plan: Plan, n: int) -> None:
    """Refuse a member that comes after those a plan was made for, where the plan depends on their number.

    Raises:
        AveragingError: naming the length the run was given.
    """
    if n >= plan.num_members:
        raise AveragingError(
            f"the weights after step {plan.step_of(n)} are member {n + 1} of {plan.num_members}: training went "
            f"on past the {plan.total_steps} steps it was announced with; give `total_steps` the whole run"
        )
