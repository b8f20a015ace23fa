"""What stands in for a module's working weights at the moment, and what is refused while it does.

The hooks that stay on a module are plain functions that look its state up: so a module with an averager attached
can be pickled and copied, and a copy has nothing to do with the swaps and averagers of the original.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swaft.errors import AveragingError


@dataclass
class Swap:
    """The state of one module, however many engines look at it."""

    active: bool = False
    """Whether other weights are in place of the live ones."""
    stash: Tensor | None = None
    """The owned live elements while active, where the engine keeps no other copy of them."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the live values of buffers while active, by clean name."""
    readers: OrderedDict[int, Callable[[], None]] = field(default_factory=OrderedDict)
    """Called before weights are written to: each returns once it has read the live ones."""
    _guards: ExitStack = field(default_factory=ExitStack)
    _lifted: bool = False

    def before_write(self, reader: Callable[[], None]) -> RemovableHandle:
        """Have `reader` called before the weights are written to; the handle's `remove` ends that."""
        handle = RemovableHandle(self.readers)
        self.readers[handle.id] = reader
        return handle

    def let_readers_finish(self) -> None:
        """Return once nobody reads the live weights any more."""
        for finish in list(self.readers.values()):
            finish()

    def guard(self, module: nn.Module, outer: nn.Module, calls: Iterable[str]) -> None:
        """Refuse, until :meth:`end`, whatever hands out the weights under the live name, or replaces them.

        These are, of every part of the module, `state_dict`, `load_state_dict` and pickling. `copy.deepcopy` is
        fine: the copy holds the average, and nothing refuses anything there.

        Args:
            module: whose weights.
            outer: what wraps it.
            calls: of `outer`, which get at the weights without asking the module for a state dict.
        """
        for part in module.modules():
            if isinstance(part, torch.jit.ScriptModule):  # takes no hooks
                continue
            for register, call in (
                (part.register_state_dict_pre_hook, "state_dict"),
                (part.register_load_state_dict_pre_hook, "load_state_dict"),
            ):
                self._guards.callback(register(_Refusal(self, type(part).__name__, call)).remove)
        for call in calls:
            outer.__dict__[call] = _Refusal(self, type(outer).__name__, call)
            self._guards.callback(outer.__dict__.pop, call)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Refuse nothing inside: for who knows the live weights from those in the module."""
        before, self._lifted = self._lifted, True
        try:
            yield
        finally:
            self._lifted = before

    def refuse(self, owner: str, call: str) -> None:
        """Raise what is wrong with a call, unless the guard is lifted."""
        if self._lifted:
            return
        if call.startswith("load"):
            raise AveragingError(
                f"{call}() of {owner} was called while averaged weights are swapped in, and what it loads would "
                "be lost when the live weights come back; leave `swapped_in()` first"
            )
        raise AveragingError(
            f"{call}() of {owner} was asked for while averaged weights are swapped in, so they would be saved as "
            "the live ones; leave `swapped_in()` first, or write the live weights with "
            "swaft.averaging.save_pretrained(averager.engine, path) and the average with averager.save_pretrained"
        )

    def end(self) -> None:
        """The live weights are back."""
        self._guards.close()
        self.active, self.stash, self.buffers = False, None, {}


class _Refusal:
    """A hook, or what stands in for a method: refuses to be called, and to be pickled with the module it is on."""

    def __init__(self, swap: Swap, owner: str, call: str):
        self._swap, self._owner, self._call = swap, owner, call

    def __call__(self, *_: object, **__: object) -> None:
        self._swap.refuse(self._owner, self._call)

    def __reduce__(self) -> NoReturn:
        raise AveragingError(
            f"a {self._owner} was pickled (torch.save, say) while averaged weights are swapped in, which would "
            "pass for the live ones; leave `swapped_in()` first, or copy it with copy.deepcopy: that makes a "
            "model which holds the average"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


def _nothing(*_: object, **__: object) -> None:
    """What stands in a copy where the original refuses."""


_SWAPS: WeakKeyDictionary[nn.Module, Swap] = WeakKeyDictionary()


def swap_of(module: nn.Module) -> Swap:
    """The one `Swap` of an unwrapped module."""
    if module not in _SWAPS:
        _SWAPS[module] = Swap()
        module.register_load_state_dict_pre_hook(_finish_reading)
    return _SWAPS[module]


def _finish_reading(module: nn.Module, *_: object) -> None:
    """What is loaded must not reach a member that is still being read."""
    swap = _SWAPS.get(module)
    if swap is not None:
        swap.let_readers_finish()
