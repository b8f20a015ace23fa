"""A search for the best weights to read out of a run: several readouts are scored, and the best is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swaft.averaging.averager import WeightAverager
from swaft.averaging.rules import Readout, WindowsPlan
from swaft.averaging.rules.base import Scope
from swaft.averaging.shards import outside
from swaft.errors import AveragingError


@dataclass(frozen=True)
class Tried:
    """A readout and its score."""

    readout: Readout
    """As `averager.swapped_in` and `averager.save_pretrained` take it."""
    start: int
    """Step of the first member in it."""
    end: int
    """Step of the last member in it."""
    members: int
    """Members in it."""
    score: float
    """What the evaluation returned on rank 0; the same on every rank."""

    def row(self) -> dict[str, Any]:
        """A row for a table, with ``start``, ``end``, ``members``, ``blend``, ``scope`` and ``score``."""
        window = {"start": self.start, "end": self.end, "members": self.members}
        return window | {"blend": self.readout.blend, "scope": self.readout.scope, "score": self.score}


@dataclass(frozen=True)
class ReadoutSearch:
    """The result of a search."""

    best: Tried
    """The best one; to save it: ``averager.save_pretrained(path, found.best.readout)``."""
    tried: tuple[Tried, ...]
    """Every readout that was tried, in order."""


def search_windows(
    averager: WeightAverager,
    evaluate: Callable[[], float],
    *,
    name: str | None = None,
    better: Callable[..., float] = max,
    windows: Sequence[tuple[float | int | None, float | int | None]] | None = None,
    blends: Sequence[float] = (),
    scopes: Sequence[Scope] = (),
) -> ReadoutSearch:
    """Score several readouts of a run and return the best (collective).

    To keep evaluations few, choices are made one after the other: the window (of the rule `Windows`), the blend of
    its mean with the last weights, then the scope. By default, the windows are first those from every boundary to
    the latest member, then those from the best of these starts to every later boundary. That is fewer than two
    evaluations per block. Each blend and each scope adds one evaluation. The search selects on the data it is
    given, so report the result on other data.

    Args:
        averager: with the rule `Windows`, or any other rule if blends or scopes are given.
        evaluate: called on every rank while the weights are in the model; returns their score. Rank 0's score is
            used on all ranks.
        name: of the rule; None: the first.
        better: the built-in ``max`` or ``min``. Among equal scores, the longer window wins, then the later one,
            then the one tried first. A NaN score never wins.
        windows: (start, end) pairs to try instead, each as `WindowsPlan.window` takes it.
        blends: blends to try, see `Readout.blend`; 0 is the last weights.
        scopes: scopes to try, see `Readout.scope`.

    Raises:
        AveragingError: there is nothing to choose, nothing is averaged yet, a window does not fall on boundaries,
            the model does not support a blend or scope, or no score is a number.
    """
    plan, count = averager.plan(name), averager.count(name)
    if not isinstance(plan, WindowsPlan) and not (blends or scopes):
        raise AveragingError(
            f"windows were searched in {name or 'an average'}, whose rule keeps none; expected the rule `Windows`, "
            "or blends or scopes to try"
        )
    if better not in (max, min):
        raise AveragingError(f"better is {better!r}, expected the function max or min")
    if count == 0:
        raise AveragingError(
            f"nothing is averaged yet at step {averager.applied_steps}; the first member is the weights after "
            f"step {plan.first_step}"
        )
    for blend in blends:
        Readout(blend=blend)  # raises if it is out of range
    for scope in scopes:
        outside(averager.engine, Readout(scope=scope).scope)
    tried: dict[Readout, Tried] = {}

    def score(readouts: Iterable[Readout]) -> Tried:
        for readout in readouts:
            if readout not in tried:
                with averager.swapped_in(readout):
                    value = averager.engine.ranks.gather(_number(evaluate()))[0]
                _, members = plan.resolved(count, readout)
                start, end = plan.step_of(members[0]), plan.step_of(members[-1])
                tried[readout] = Tried(readout, start, end, len(members), value)
        return _best(tried.values(), better)

    def window(start: float | int | None, end: float | int | None) -> Readout:
        return plan.resolved(count, Readout(name, start=start, end=end))[0]

    if windows is not None:
        best = score([window(*each) for each in windows])
    elif isinstance(plan, WindowsPlan):
        boundaries = plan.boundaries(count)
        start = score([window(begin, None) for begin, _ in boundaries]).start
        best = score([window(start, end) for _, end in boundaries if end >= start])
    else:
        best = score([Readout(name)])
    best = score([replace(best.readout, blend=blend) for blend in blends])
    best = score([replace(best.readout, scope=scope) for scope in scopes])
    return ReadoutSearch(best, tuple(tried.values()))


def most_evaluations(averager: WeightAverager, *, blends: Sequence[float] = ()) -> int:
    """Return how many evaluations `search_windows` makes at most, of the first rule and with these blends."""
    plan, windows = averager.plan(), 1
    if isinstance(plan, WindowsPlan):
        windows = 2 * len(plan.boundaries(averager.count())) - 1  # one window is in both passes
    return windows + len(blends)


def _best(tried: Iterable[Tried], better: Callable[..., float]) -> Tried:
    numbers = [each for each in tried if not math.isnan(each.score)]
    if not numbers:
        raise AveragingError(
            f"none of the {len(list(tried))} windows that were tried has a number for a score"
        )
    top = better(each.score for each in numbers)
    return max((each for each in numbers if each.score == top), key=lambda each: (each.members, each.end))


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise AveragingError(
            f"evaluate returned {type(score).__name__}, expected one number: metrics['accuracy'], say"
        ) from error
