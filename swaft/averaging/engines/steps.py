"""Counts the optimizer steps of engines that keep no count, with hooks that die with the object that set them."""

from __future__ import annotations

import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from swaft.errors import AveragingError
from swaft.options import WholeNumber, require_value

if TYPE_CHECKING:
    from swaft.averaging.engines.base import Engine
    from swaft.averaging.rules import Plan

logger = logging.getLogger(__name__)

_outlived: list[RemovableHandle] = []
"""Hooks whose object is gone. Garbage collection may run while torch iterates over these very hooks, which must not
change meanwhile; so they stay, doing nothing, until they are removed."""
_counters: weakref.WeakSet[StepCounter] = weakref.WeakSet()
_ages = itertools.count()
"""Which of two counters is the newer one."""


def hook_weakly(
    register: Callable[[Callable[..., None]], RemovableHandle], method: Callable[..., None]
) -> None:
    """Register a bound method as a hook that does not keep its object alive, and does nothing once that is gone.

    Call it outside of an optimizer step. It also removes hooks that have outlived their objects.

    Args:
        register: takes a hook and returns a handle with `remove()`.
        method: bound method of the object whose life bounds the hook's; called with the hook's arguments.
    """
    _remove_outlived()
    reference = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    handle = register(hook)
    weakref.finalize(method.__self__, _outlived.append, handle).atexit = False  # type: ignore[attr-defined]


def _remove_outlived() -> None:
    while _outlived:
        _outlived.pop().remove()


def steps_taken(*optimizers: Optimizer) -> int | None:
    """The number of steps recorded in the state of optimizers; None if they have a state without a count (SGD).

    Read from the ``step`` of parameters or groups, where Adam and its relatives keep it; the largest if they
    differ.
    """
    given: tuple[Any, ...] = optimizers
    # A ZeroRedundancyOptimizer's own state is what it has loaded, with None for the parameters of other ranks.
    own = [each.optim if type(each).__name__ == "ZeroRedundancyOptimizer" else each for each in given]
    states = [state for optimizer in own for state in optimizer.state.values()]
    groups = [group for optimizer in own for group in optimizer.param_groups]
    steps = [int(each["step"]) for each in (*states, *groups) if "step" in each]
    if not steps and any(states):
        return None
    return max(steps, default=0)


# In a compiled step: torch cannot compile a look at the stack, and would warn.
@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def fills_state() -> bool:
    """Whether the step that is being taken is only torch's way to fill an empty optimizer state.

    `torch.distributed.checkpoint.state_dict` takes it, at rate 0 on zero gradients, before it saves or loads one.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None


def require_same(settings: Sequence[str]) -> None:
    """Refuse settings, one text per rank, that are not the same on every rank."""
    for rank, other in enumerate(settings):
        if other != settings[0]:
            raise AveragingError(
                f"rank {rank} was given (rules, total_steps, precision, first_step) = {other}, and rank 0 "
                f"{settings[0]}; expected the same on every rank"
            )


def begin(engine: Engine, first_step: int | None, total_steps: int) -> int:
    """Find how many optimizer steps a run has taken, and let its engine continue counting from there (collective).

    Args:
        engine: of the run.
        first_step: the step, if known. None: taken from DeepSpeed's counter or the optimizer's state.
        total_steps: optimizer steps of the whole run.

    Raises:
        ConfigError: `first_step` is not a valid number of steps.
        AveragingError: the step is past the end of the run.
    """
    counted = engine.outer is not engine.module
    source = "DeepSpeed has counted" if counted else "the optimizer's state says"
    if first_step is not None:
        require_value("first_step", first_step, WholeNumber)
        source = "first_step says"
    step = max(engine.ranks.gather(engine.applied_steps())) if first_step is None else int(first_step)
    engine.continue_from(step)
    engine.watch_weights()
    if step > total_steps:
        raise AveragingError(
            f"the run is at optimizer step {step}, as {source}, past its total_steps={total_steps}; expected "
            "the steps of the whole run, those before this process included, or first_step=0 if a new run begins "
            "here, or if `load_state` resumes one that has passed its end"
        )
    if first_step is not None or not engine.ranks.is_main:
        return step
    guessed = not counted  # the state may be left over from an earlier run
    if step:
        level = logging.WARNING if guessed else logging.INFO
        logger.log(level, "averaging begins at optimizer step %d of %d, as %s", step, total_steps, source)
    elif guessed and steps_taken(*engine.inner_optimizers) is None:
        logger.warning(
            "the optimizer (%s) has a state that does not say after how many steps, so they are counted from 0; "
            "if the run continues an earlier one, pass their number as first_step",
            type(engine.inner_optimizer).__name__,
        )
    return step


def refuse_missed(plans: Iterable[Plan], before: int, applied: int) -> None:
    """Refuse to go on if members were due between two calls of `WeightAverager.step`.

    Args:
        plans: of all rules.
        before: the applied step of the last call.
        applied: the applied step now.

    Raises:
        AveragingError: names the first step that was missed.
    """
    plans = list(plans)
    missed = [step for step in range(before + 1, applied) if any(plan.takes(step) for plan in plans)]
    if missed:
        raise AveragingError(
            f"the optimizer took {applied - before} steps since the last `averager.step()`, and step {missed[0]} "
            "among them was to be averaged; expected a call after every optimizer step (`averager.close()` where "
            "averaging ends before training does), and an averager that is attached after a checkpoint was loaded, "
            "not before"
        )


class StepCounter:
    """Counts the steps that optimizers really took, and raises if another optimizer steps the same weights.

    Of several that train together, the last one's steps are counted. The count starts from their state
    (:func:`steps_taken`), or from 0 if the state has no count, and restarts from it when a state is loaded. It
    hooks the optimizers themselves, so neither a micro-batch nor a step that a loss scaler skips is counted, nor
    one that only fills an empty state (:func:`fills_state`).

    If a newer counter counts the steps of that other optimizer, this one is `superseded`, and silent. So training
    may begin again although something still holds the old averager (a traceback, a notebook's output).
    """

    def __init__(self, *optimizers: Optimizer):
        self.count = steps_taken(*optimizers) or 0
        self.superseded = False
        """Whether the weights are trained by another optimizer now, whose steps a newer counter counts."""
        self._optimizers = optimizers
        self._age = next(_ages)
        _counters.add(self)
        self._calls = 0
        self._inside = self._stopped = False
        self._calls_before_others: dict[int, int] = {}
        hook_weakly(register_optimizer_step_pre_hook, self._before)
        hook_weakly(register_optimizer_step_post_hook, self._after)
        for optimizer in optimizers:
            hook_weakly(optimizer.register_load_state_dict_post_hook, self._loaded)

    def __call__(self) -> int:
        """Steps taken; call it only outside of a step."""
        self._inside = False  # a step that ended in an error leaves it set
        _remove_outlived()
        return self.count

    def stop(self) -> None:
        """Let other optimizers step the weights from now on."""
        self._stopped = True

    def _loaded(self, _: Optimizer) -> None:
        known = steps_taken(*self._optimizers)
        self.count = self.count if known is None else known

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        if fills_state():
            self._inside = False  # so that its end does not count either
            return
        if optimizer in self._optimizers:
            self._calls += 1
            self._inside = True
        elif not self._inside and self._parameters_of(*self._optimizers) & self._parameters_of(optimizer):
            self._calls_before_others[id(optimizer)] = self._calls

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer in self._optimizers:
            if not self._inside:
                return  # a subclass: its `super().step()` is hooked too and has been counted
            self._inside = False
            # A fused optimizer is called on an overflow too and skips the step itself; during the call, torch's
            # scaler leaves its verdict on the optimizer.
            found_inf = getattr(optimizer, "found_inf", None)
            if optimizer is self._optimizers[-1] and (found_inf is None or not bool(found_inf)):
                self.count += 1
        elif self._calls_before_others.pop(id(optimizer), None) == self._calls and not self._stopped:
            # Ours did not step meanwhile, so the other is not a wrapper around it but a replacement.
            self.superseded = self._stopped = any(each._counts_instead(self, optimizer) for each in _counters)
            if not self.superseded:
                raise AveragingError(
                    f"another {type(optimizer).__name__} than the one the averager was attached to has stepped "
                    "the averaged parameters, and its steps would not be counted; attach a new averager after the "
                    "optimizer is rebuilt, or attach to the one whose step() is called (of a wrapper, say)"
                )

    def _counts_instead(self, older: StepCounter, optimizer: Optimizer) -> bool:
        return optimizer in self._optimizers and self._age > older._age

    @staticmethod
    def _parameters_of(*optimizers: Optimizer) -> set[int]:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return {id(parameter) for group in groups for parameter in group["params"]}
