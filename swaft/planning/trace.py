"""What one micro-batch holds in memory, moment by moment, found by running the real model.

On fake tensors shapes, types and lifetimes are real and values are not there, so a model of any size takes seconds
and no memory. What an engine adds (gathered weights, gradients kept, buckets) is for others to say; therefore a
trace also tells when each module begins and ends, and when each gradient is there.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["enter", "leave", "turn", "gradient", "end"]


@dataclass(frozen=True)
class Moment:
    """Something an engine reacts to, and the most memory that was in use since the moment before."""

    kind: Kind
    """enter, leave: a module with parameters of its own begins and ends, in forward and in backward; turn: forward
    has ended; gradient: one is complete; end: backward has ended."""
    parameters: tuple[int, ...]
    """Which parameters, by their position in ``model.parameters()``."""
    peak_bytes: int
    """Most bytes in use since the last moment, parameters, buffers and finished gradients not counted."""
    live_bytes: int
    """Bytes in use at this moment, counted likewise."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, fake or real, from the operations that make them.

    Args:
        ignored: tensors whose storages are not counted.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in ignored:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size).atexit = False

    def restart_peak(self) -> int:
        """Return the most bytes since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _freed(self, size: int) -> None:
        self.live -= size


class HasLoss(Protocol):
    """What an objective returns."""

    @property
    def loss(self) -> Tensor:
        """A scalar."""
        ...


def trace_step(model: nn.Module, compute: Callable[[], HasLoss]) -> list[Moment]:
    """Run forward and backward of one micro-batch, and tell what is in use when.

    What the objective returned (the logits, for the most part) lives until the next micro-batch has returned, as in
    the training loop: it is counted in the forward of the next. Gradients are taken away as soon as they are
    complete: where they go is the engine's affair.

    Args:
        model: the model, in training mode; its tensors may be fake.
        compute: gives a result with a loss, whose backward is run.

    Returns:
        The moments of any micro-batch but the first, in order.
    """
    moments: list[Moment] = []
    position = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    with (
        LiveBytes([*model.parameters(), *model.buffers()]) as memory,
        ExitStack() as hooks,
        warnings.catch_warnings(),
    ):
        # A module whose inputs need no gradient, as an embedding's, ends when its outputs' gradients are there.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")

        def note(kind: Kind, parameters: Iterable[Tensor]) -> None:
            numbers = tuple(position[id(parameter)] for parameter in parameters)
            moments.append(Moment(kind, numbers, memory.restart_peak(), memory.live))

        def take(parameter: Tensor) -> None:
            parameter.grad = None
            note("gradient", [parameter])

        for parameter in model.parameters():
            if parameter.requires_grad:
                hooks.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        for module in model.modules():
            if own := list(module.parameters(recurse=False)):
                hooks.enter_context(_bracketed(module, own, note))
        result = compute()
        note("turn", ())
        result.loss.backward()
        note("end", ())
    turn = next(i for i, moment in enumerate(moments) if moment.kind == "turn")
    kept = moments[-1].live_bytes
    return [
        replace(moment, peak_bytes=moment.peak_bytes + kept, live_bytes=moment.live_bytes + kept)
        if i <= turn
        else moment
        for i, moment in enumerate(moments)
    ]


@contextmanager
def _bracketed(
    module: nn.Module, own: list[nn.Parameter], note: Callable[[Kind, Iterable[Tensor]], None]
) -> Iterator[None]:
    """Note when a module begins and ends, in the forward and the backward pass."""
    handles = [
        module.register_forward_pre_hook(lambda *_: note("enter", own)),
        module.register_forward_hook(lambda *_: note("leave", own)),
        module.register_full_backward_pre_hook(lambda *_: note("enter", own)),
        module.register_full_backward_hook(lambda *_: note("leave", own)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
