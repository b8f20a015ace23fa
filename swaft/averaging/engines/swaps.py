"""What stands in for a module's working weights at the moment, and who has to be asked before they change.

The hooks on a module are plain functions that look its state up: so a module with an averager attached can be
pickled and copied, and a copy has nothing to do with the swaps and averagers of the original.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

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
    readers: OrderedDict[int, Callable[[], None]] = field(default_factory=OrderedDict)
    """Called before weights are written to: each returns once it has read the live ones."""

    def before_write(self, reader: Callable[[], None]) -> RemovableHandle:
        """Have `reader` called before the weights are written to; the handle's `remove` ends that."""
        handle = RemovableHandle(self.readers)
        self.readers[handle.id] = reader
        return handle

    def let_readers_finish(self) -> None:
        """Return once nobody reads the live weights any more."""
        for finish in list(self.readers.values()):
            finish()


_SWAPS: WeakKeyDictionary[nn.Module, Swap] = WeakKeyDictionary()


def swap_of(module: nn.Module) -> Swap:
    """The one `Swap` of an unwrapped module."""
    if module not in _SWAPS:
        _SWAPS[module] = Swap()
        module.register_state_dict_pre_hook(_refuse_state_dict)
        module.register_load_state_dict_pre_hook(_finish_reading)
    return _SWAPS[module]


def _refuse_state_dict(module: nn.Module, *_: object) -> None:
    """What others save inside a swap would be the average under the live name."""
    swap = _SWAPS.get(module)
    if swap is not None and swap.active:
        raise AveragingError(
            "the model's state_dict() was asked for while averaged weights are swapped in, so they would be "
            "saved as the live ones; leave `swapped_in()` first, or write the live weights with "
            "swaft.averaging.save_pretrained and the average with averager.save_pretrained"
        )


def _finish_reading(module: nn.Module, *_: object) -> None:
    """What is loaded must not reach a member that is still being read."""
    swap = _SWAPS.get(module)
    if swap is not None:
        swap.let_readers_finish()
