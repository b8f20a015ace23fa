"""Finds the window of a run whose averaged weights score best on validation data, without training again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swaft.averaging.rules import Readout, WindowsPlan
from swaft.errors import AveragingError

if TYPE_CHECKING:
    from swaft.averaging.averager import WeightAverager


@dataclass(frozen=True)
class Window:
    """The members with ``start <= step <= end``."""

    start: int
    """Step of the first member."""
    end: int
    """Step of the last member."""
    members: int
    """How many there are."""


@dataclass(frozen=True)
class WindowSearch:
    """What a search found."""

    best: Window
    """The best window."""
    readout: Readout
    """Its mean: ``averager.save_pretrained(path, found.readout)``."""
    score: float
    """Its score."""
    scores: Mapping[Window, float]
    """Every window that was tried, in that order, and its score."""


def search_windows(
    averager: WeightAverager,
    evaluate: Callable[[], float],
    *,
    name: str | None = None,
    better: Callable[..., float] = max,
    windows: Sequence[tuple[float | int | None, float | int | None]] | None = None,
) -> WindowSearch:
    """Score the means of several windows and return the best (collective).

    By default the windows are, first, those from every boundary to the latest member, then those from the best of
    these starts to every later boundary: fewer than twice as many evaluations as there are blocks. The search
    chooses by the data it is shown, so report the result on other data.

    Args:
        averager: with a rule `Windows`.
        evaluate: called on every rank while a window's mean is in the model; returns its score. That of rank 0
            counts, on every rank.
        name: which rule; None: the first.
        better: the built-in ``max`` or ``min``. Of equal scores the longer window wins, then the later one. A score
            that is no number never wins.
        windows: (start, end) pairs to try instead, each as `WindowsPlan.window` takes it.

    Raises:
        AveragingError: the rule keeps no windows, nothing is averaged yet, a window does not fall on boundaries, or
            no score is a number.
    """
    plan = averager.plan(name)
    if not isinstance(plan, WindowsPlan):
        raise AveragingError(
            f"windows were searched in a {type(plan).__name__}, which keeps none; expected the rule `Windows`"
        )
    if better not in (max, min):
        raise AveragingError(f"better is {better!r}, expected the function max or min")
    num_members = averager.count(name)
    if num_members == 0:
        raise AveragingError(
            f"nothing is averaged yet at step {averager.applied_steps}; the first member is the weights after "
            f"step {plan.first_step}"
        )

    scores: dict[Window, float] = {}

    def score(candidates: Iterable[Window]) -> Window:
        for window in candidates:
            if window not in scores:
                with averager.swapped_in(Readout(name, start=window.start, end=window.end)):
                    value = _number(evaluate())
                scores[window] = averager.engine.ranks.gather(value)[0]
        return _best(scores, better)

    if windows is None:
        boundaries = plan.boundaries(num_members)
        start = score([_window(plan, num_members, begin, None) for begin, _ in boundaries]).start
        best = score([_window(plan, num_members, start, end) for _, end in boundaries if end >= start])
    else:
        best = score([_window(plan, num_members, start, end) for start, end in windows])
    readout = Readout(name, start=best.start, end=best.end)
    return WindowSearch(best=best, readout=readout, score=scores[best], scores=scores)


def _window(
    plan: WindowsPlan, num_members: int, start: float | int | None, end: float | int | None
) -> Window:
    members = plan.window(num_members, start, end)
    return Window(plan.step_of(members[0]), plan.step_of(members[-1]), len(members))


def _best(scores: Mapping[Window, float], better: Callable[..., float]) -> Window:
    numbers = {window: score for window, score in scores.items() if not math.isnan(score)}
    if not numbers:
        raise AveragingError(f"none of the {len(scores)} windows that were tried has a number for a score")
    top = better(numbers.values())
    return max(
        (window for window, score in numbers.items() if score == top),
        key=lambda window: (window.members, window.end),
    )


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise AveragingError(
            f"evaluate returned {type(score).__name__}, expected one number: metrics['accuracy'], say"
        ) from error
