"""Counts the optimizer steps of engines that keep no count of their own, by hooks that die with who set them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from swaft.errors import AveragingError

_outlived: list[RemovableHandle] = []
"""Hooks whose object is gone. The collector may find that out while torch goes through the very hooks, which
must not change meanwhile; so they do nothing until somebody removes them."""


def hook_weakly(
    register: Callable[[Callable[..., None]], RemovableHandle], method: Callable[..., None]
) -> None:
    """Set a bound method as a hook that does not keep its object alive, and does nothing once that is gone.

    Called outside of an optimizer step; there hooks that have outlived their objects are removed, too.

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


class StepCounter:
    """Counts the steps that one optimizer really took, and refuses that another takes them instead.

    It hooks the optimizers themselves, so neither a micro-batch nor a step that a loss scaler skips is counted.
    """

    def __init__(self, optimizer: Optimizer):
        self.count = 0
        self._optimizer = optimizer
        self._calls = 0
        self._inside = False
        self._calls_before_others: dict[int, int] = {}
        hook_weakly(register_optimizer_step_pre_hook, self._before)
        hook_weakly(register_optimizer_step_post_hook, self._after)

    def __call__(self) -> int:
        """Steps taken since this counter was made; asked outside of a step only."""
        self._inside = False  # whatever a step has left that ended in an error
        _remove_outlived()
        return self.count

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer is self._optimizer:
            self._calls += 1
            self._inside = True
        elif not self._inside and self._shares_parameters(optimizer):
            self._calls_before_others[id(optimizer)] = self._calls

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer is self._optimizer:
            self._inside = False
            # A fused optimizer is called on an overflow too, and skips the step by itself; torch's scaler leaves
            # its verdict on the optimizer for the time of the call.
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is None or not bool(found_inf):
                self.count += 1
        elif self._calls_before_others.pop(id(optimizer), None) == self._calls:
            # Ours did not step meanwhile, so the other is no wrapper around it but stands in its place.
            raise AveragingError(
                f"another {type(optimizer).__name__} than the one the averager was attached to has stepped the "
                "averaged parameters, and its steps would not be counted; attach a new averager after the "
                "optimizer is rebuilt, and delete the old one"
            )

    def _shares_parameters(self, other: Optimizer) -> bool:
        ours = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        return any(id(parameter) in ours for group in other.param_groups for parameter in group["params"])
