"""What a rule says about a run: which optimizer steps are members, and what each does to the lanes.

Pure arithmetic. A *lane* is one vector as long as the weights, kept from the first member on. All a rule can do is
move a lane towards a member or towards another lane,

    lane <- lane + weight * (source - lane),          weight 1 copies,

and say which linear combination of its lanes is the average. So every rule is a table of numbers, and the code that
holds the vectors does not need to know the rules.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Integral
from typing import Annotated, Any, Literal, Protocol

from swaft.errors import AveragingError, ConfigError
from swaft.fraction import share_of
from swaft.options import Count, Range, StepOrShare, require, require_value, value_faults

Precision = Literal["compensated", "plain"]
"""Of running means: ``compensated`` takes 6 bytes per element and is exact to the last digits of fp32 in runs of
any length; ``plain`` takes 4 bytes and loses digits in long runs."""


@dataclass(frozen=True)
class Update:
    """``lane <- lane + weight * (source - lane)``."""

    lane: int
    """Which lane of the rule moves."""
    weight: float
    """Share of the source, in (0, 1]; 1 copies it."""
    source: int | None = None
    """The lane to move towards, in its state after the preceding updates; None: the member itself."""


Blend = Annotated[float, Range(low=-1, high=2)]
Scope = Literal["all", "no_embeddings", "no_head"]
"""Which weights an average may replace; the rest keep their last values."""


@dataclass(frozen=True)
class Readout:
    """Which weights to read out of a run: which rule's average, the choices that its rule leaves open until
    afterwards, and how far to go from the last weights towards it.

    Raises:
        AveragingError: the blend is out of range, or there is no such scope.
    """

    rule: str | None = None
    """Name of the rule; None: the first."""
    _: KW_ONLY
    start: float | int | None = None
    """First step of a window (`Windows`): a float is a fraction of the run, an int a step; None: the first
    member."""
    end: float | int | None = None
    """Last step of a window, given the same way; None: the latest member."""
    sigma_rel: float | None = None
    """Relative width of the profile (`PowerEMA`); None: the first tracked one."""
    blend: Blend = 1.0
    """``last + blend * (average - last)``, from -1 to 2: 1 is the average, 0 the last weights, bit for bit."""
    scope: Scope = "all"
    """Which weights to blend; the rest keep their last values."""

    def __post_init__(self) -> None:
        if faults := value_faults("blend", self.blend, Blend) + value_faults("scope", self.scope, Scope):
            raise AveragingError("; ".join(faults))

    def refuse_all_but(self, *offered: str) -> None:
        """Refuse a choice that a rule does not offer.

        Raises:
            AveragingError: names the choice and what the rule offers.
        """
        for name in ("start", "end", "sigma_rel"):
            if getattr(self, name) is not None and name not in offered:
                known = " or ".join(offered) or "no choice"
                raise AveragingError(
                    f"this rule's average cannot be chosen by {name!r}; it offers {known} "
                    "(Windows takes start and end, PowerEMA sigma_rel)"
                )


DEFAULT = Readout()
"""The average of the first rule, without any choices."""


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """The averaging events of one run, and what each one does.

    Steps are applied optimizer steps: "step ``t``" is the weights after ``t`` updates, step 0 those before
    training. ``n`` always counts members, from 0.
    """

    first_step: int
    """Step of the first member."""
    every: int
    """Optimizer steps between two members."""
    total_steps: int
    """Optimizer steps of the whole run."""
    rule: Any = None
    """The rule this plan was made from; its ``repr`` describes it completely."""

    def step_of(self, n: int) -> int:
        """The step whose weights are member ``n``."""
        return self.first_step + n * self.every

    def takes(self, step: int) -> bool:
        """Whether the weights after ``step`` updates are a member."""
        return step >= self.first_step and (step - self.first_step) % self.every == 0

    def members_until(self, step: int) -> int:
        """Members among the weights of steps 0 to ``step``."""
        return max(0, (step - self.first_step) // self.every + 1)

    @property
    def num_members(self) -> int:
        """Members of the whole run."""
        return self.members_until(self.total_steps)

    @property
    @abstractmethod
    def lanes(self) -> tuple[bool, ...]:
        """The lanes: True for a running mean (6 bytes per element), False for plain copies (4 bytes)."""

    @abstractmethod
    def updates(self, n: int) -> tuple[Update, ...]:
        """What member ``n`` does to the lanes, in order. The first update of a lane is a copy (weight 1)."""

    @abstractmethod
    def readout(self, num_members: int, chosen: Readout = DEFAULT) -> dict[int, float]:
        """The average after ``num_members`` members (at least 1): lane to coefficient.

        Raises:
            AveragingError: the rule does not offer the choice or cannot serve it; the message says what it can
                serve.
        """

    def resolved(self, num_members: int, chosen: Readout) -> tuple[Readout, range]:
        """The choice in canonical form, however it was spelled, and the members that it averages.

        Raises:
            AveragingError: as for :meth:`readout`.
        """
        return chosen, range(num_members)

    def in_words(self, num_members: int, chosen: Readout) -> str:
        """What a choice reads out after ``num_members`` members: ``the 9 weights from step 0 to 8``, say.

        Raises:
            AveragingError: as for :meth:`readout`.
        """
        if chosen.blend == 0:
            return "the last weights"
        chosen, members = self.resolved(num_members, chosen)
        first, last = self.step_of(members[0]), self.step_of(members[-1])
        several = f"the {len(members):,} weights from step {first:,} to {last:,}"
        words = [several if len(members) > 1 else f"the weights of step {last:,}"]
        if chosen.sigma_rel is not None:
            words.append(f"with sigma_rel={chosen.sigma_rel:g}")
        if chosen.blend != 1:
            words.append(f"{chosen.blend:g} of the way from the last ones")
        if chosen.scope != "all":
            words.append(f"with the last weights in the {chosen.scope.removeprefix('no_')}")
        return ", ".join(words)

    def finished(self, n: int) -> tuple[int, ...]:
        """Lanes that member ``n`` changed and no later member will change: they may move to disk."""
        return ()

    def refuse_surplus(self, n: int) -> None:
        """Refuse member ``n`` if the plan was made for fewer members.

        Raises:
            AveragingError: names the number of steps that the plan was made for.
        """
        if n >= self.num_members:
            raise AveragingError(
                f"the weights after step {self.step_of(n)} are member {n + 1} of {self.num_members}: training went "
                f"on past the {self.total_steps} steps it was announced with; give `total_steps` the whole run"
            )


@dataclass(frozen=True, kw_only=True)
class SettledPlan(Plan):
    """A plan whose average leaves nothing to choose after training; by default, one running mean."""

    moves: Callable[[int], tuple[Update, ...]]
    """What member ``n`` does to the lanes, see :func:`one_mean`."""
    kinds: tuple[bool, ...] = (True,)
    """See `Plan.lanes`."""
    average: Callable[[int], dict[int, float]] = lambda num_members: {0: 1.0}
    """The average after a given number of members: lane to coefficient."""
    fixed_length: bool = False
    """Whether the plan works for `num_members` members and no more."""
    last: int | None = None
    """How many of the latest members are in the average; None: all."""

    @property
    def lanes(self) -> tuple[bool, ...]:
        """See :class:`Plan`."""
        return self.kinds

    def updates(self, n: int) -> tuple[Update, ...]:
        """See :class:`Plan`."""
        if self.fixed_length:
            self.refuse_surplus(n)
        return self.moves(n)

    def readout(self, num_members: int, chosen: Readout = DEFAULT) -> dict[int, float]:
        """See :class:`Plan`."""
        chosen.refuse_all_but()
        return self.average(num_members)

    def resolved(self, num_members: int, chosen: Readout) -> tuple[Readout, range]:
        """See :class:`Plan`."""
        return chosen, range(num_members)[-(self.last or num_members) :]


def one_mean(weight: Callable[[int], float]) -> Callable[[int], tuple[Update, ...]]:
    """What members do to a single running mean; after the first, they get ``weight(1), ...``; 0 changes nothing."""

    def moves(n: int) -> tuple[Update, ...]:
        share = 1.0 if n == 0 else weight(n)
        return (Update(0, share),) if share > 0 else ()

    return moves


class Rule(Protocol):
    """Anything that can plan the averaging events of a run. Its ``repr`` must describe it completely."""

    def plan(self, total_steps: int) -> Plan:
        """The events of a run of ``total_steps`` optimizer steps.

        Raises:
            ConfigError: an option is out of range or does not fit the run, or fewer than two weights would be
                averaged.
        """
        ...


def resolve_start(start: float | int, total_steps: int, *, name: str = "start") -> int:
    """The step that a start denotes: a float means ``floor(start * total_steps)``, exact for the decimal number as
    written; an int is the step itself.

    Args:
        start: the fraction or step.
        total_steps: optimizer steps of the whole run.
        name: what error messages call it.

    Raises:
        ConfigError: a fraction outside [0, 1], or a negative step.
    """
    require_value(name, start, StepOrShare)
    return int(start) if isinstance(start, Integral) else math.floor(share_of(total_steps, start))


def spaced(rule: Any, total_steps: int, *, skipped: int = 0) -> dict[str, Any]:
    """The arguments of a plan whose members are ``rule.every`` steps apart, starting at ``rule.start``.

    Args:
        rule: a dataclass; all of its options are checked.
        total_steps: optimizer steps of the whole run.
        skipped: members left out at the beginning.

    Raises:
        ConfigError: an option is out of range, or fewer than two weights would be averaged.
    """
    require(rule)
    first = resolve_start(rule.start, total_steps) + skipped * rule.every
    members = max(0, (total_steps - first) // rule.every + 1)
    if members < 2:
        raise ConfigError(
            f"start={rule.start} with every={rule.every} puts the first member at step {first} of {total_steps}, "
            f"so {members} weights would be averaged; expected at least 2: start earlier (start), average more "
            "often (every) or train longer (total_steps; recipes: train.max_steps or train.num_train_epochs)"
        )
    return {"first_step": first, "every": rule.every, "total_steps": total_steps, "rule": rule}


def plan_all(rules: Mapping[str, Rule], total_steps: int, precision: str) -> dict[str, Plan]:
    """The events of every rule in a run of ``total_steps`` optimizer steps.

    Args:
        rules: by name.
        total_steps: of the whole run.
        precision: of running means.

    Raises:
        ConfigError: lists every rule, name or number that does not fit.
    """
    problems = value_faults("total_steps", total_steps, Count)
    problems += [
        f"rule: {name!r} is not a valid rule name, expected text that is not empty"
        for name in rules
        if not isinstance(name, str) or not name
    ]
    problems += [
        f"rule: {rule!r} is not a rule, expected swaft.SWA(...), say, or several by name: {{'swa': swaft.SWA(...)}}"
        for rule in rules.values()
        if isinstance(rule, type) or not hasattr(rule, "plan")
    ]
    if problems or not rules:
        raise ConfigError(problems or "rule={} names no rule, expected at least one")
    problems, plans = value_faults("precision", precision, Precision), dict[str, Plan]()
    for name, rule in rules.items():
        try:
            plans[name] = replace(rule.plan(total_steps), rule=rule)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return plans
