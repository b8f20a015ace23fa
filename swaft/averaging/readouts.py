"""Which weights are read out of a run: a blend of an average with the last weights, and the one that scores best.

A blend is ``last + blend * (average - last)``. The last weight and the average of an element lie on the same rank,
so nothing is sent, and the bits are the same under every engine and any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swaft.averaging.adapters import is_peft
from swaft.averaging.engines import Engine
from swaft.averaging.rules import Readout, WindowsPlan
from swaft.averaging.rules.base import Scope
from swaft.errors import AveragingError

if TYPE_CHECKING:
    from swaft.averaging.averager import WeightAverager


@torch.no_grad()
def blended(engine: Engine, average: Tensor, chosen: Readout) -> Tensor:
    """This rank's elements of a blend, elementwise in fp32: exactly the last weights at 0, and the average at 1.

    Args:
        engine: whose last weights.
        average: (engine.numel,), fp32, host; returned itself where it is what is chosen, and never changed.
        chosen: says how far to go, and for which weights.

    Returns:
        (engine.numel,), fp32, host.
    """
    if chosen.blend == 1 and chosen.scope == "all":
        return average
    last = engine.live_shard()
    if chosen.blend == 0:
        return last
    result = average.clone() if chosen.blend == 1 else (average - last).mul_(chosen.blend).add_(last)
    kept, position = outside(engine, chosen.scope), 0
    for fragment in engine.fragments:
        end = position + fragment.numel
        if fragment.name in kept:
            result[position:end] = last[position:end]
        position = end
    return result


def outside(engine: Engine, scope: str) -> set[str]:
    """Names of the trained parameters that a scope leaves as they are.

    Embeddings are those of every `torch.nn.Embedding`, with what is tied to them. The head is what a Hugging Face
    model has beside its body.

    Raises:
        AveragingError: the model does not say what its head is, or the scope would leave none, or all, as they are.
    """
    if scope == "all":
        return set()
    if scope == "no_embeddings":
        parts = [part for part in engine.module.modules() if isinstance(part, nn.Embedding)]
        kept = {id(parameter) for part in parts for parameter in part.parameters()}
    else:
        model: Any = engine.module.get_base_model() if is_peft(engine.module) else engine.module  # type: ignore[operator]
        body = getattr(model, getattr(model, "base_model_prefix", None) or "\0", None)
        if not isinstance(body, nn.Module):
            raise AveragingError(
                f"scope='no_head' was asked of a {type(model).__name__}, which does not say what its head is; "
                "expected a Hugging Face model with a head on its body (base_model_prefix)"
            )
        kept = {id(each) for each in model.parameters()} - {id(each) for each in body.parameters()}
    names = {name for name, parameter in engine.trainable.items() if id(parameter) in kept}
    if not names or len(names) == len(engine.trainable):
        raise AveragingError(
            f"scope={scope!r} would leave {len(names)} of the {len(engine.trainable)} trained parameters as they "
            "are; expected some of them, and not all: choose scope='all'"
        )
    return names


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
    """How many there are."""
    score: float
    """What the evaluation returned; on every rank that of rank 0."""

    def row(self) -> dict[str, Any]:
        """The same as a row of a table: ``start``, ``end``, ``members``, ``blend``, ``scope`` and ``score``."""
        window = {"start": self.start, "end": self.end, "members": self.members}
        return window | {"blend": self.readout.blend, "scope": self.readout.scope, "score": self.score}


@dataclass(frozen=True)
class ReadoutSearch:
    """What a search found."""

    best: Tried
    """The best: ``averager.save_pretrained(path, found.best.readout)``."""
    tried: tuple[Tried, ...]
    """Every readout that was tried, in that order."""


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

    One thing is chosen after the other, so that evaluations are few: the window (of the rule `Windows`), the blend
    of its mean with the last weights, the weights which that is done to. By default the windows are, first, those
    from every boundary to the latest member, then those from the best of these starts to every later boundary:
    fewer than twice as many evaluations as there are blocks. Each blend and each scope is one more. The search
    chooses by the data it is shown, so report the result on other data.

    Args:
        averager: with the rule `Windows`, or any other where blends or scopes are given.
        evaluate: called on every rank while the weights are in the model; returns their score. That of rank 0
            counts, on every rank.
        name: which rule; None: the first.
        better: the built-in ``max`` or ``min``. Of equal scores the longer window wins, then the later one, then
            what was tried first. A score that is no number never wins.
        windows: (start, end) pairs to try instead, each as `WindowsPlan.window` takes it.
        blends: to try, each as `Readout.blend`; 0 is the last weights.
        scopes: to try, each as `Readout.scope`.

    Raises:
        AveragingError: there is nothing to choose, nothing is averaged yet, a window does not fall on boundaries, a
            blend or a scope does not exist for the model, or no score is a number.
    """
    plan, count = averager.plan(name), averager.count(name)
    if not isinstance(plan, WindowsPlan) and (windows or not (blends or scopes)):
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
        Readout(blend=blend)  # raises for one that does not exist
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
