"""Puts averaged weights in place of the working weights, and restores the live ones, whatever happens inside.

If the working weights are a cast of separate masters, no backup is kept: the masters are cast again. Only if
masters and weights are the same tensors are the live ones stashed, sharded over the ranks like the average. Buffers
that training changes are copied and put back.

The state of a swap belongs to the module (:class:`Swap`), so several averagers of one model, or of parts of it,
know of it. The hooks that stay on a module are plain functions that look this state up. So a module with an
averager attached can be pickled and copied, and a copy is independent of the swaps and averagers of the original.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from swaft.averaging.adapters import merged_layers
from swaft.averaging.buffers import changing_buffers, derive_buffers
from swaft.errors import AveragingError, LayoutError

if TYPE_CHECKING:
    from swaft.averaging.engines import Engine
    from swaft.averaging.host.pipeline import Pipeline

logger = logging.getLogger(__name__)


@contextmanager
def swapped_in(
    engine: Engine,
    shard: Tensor,
    statistics: Mapping[str, Tensor] | None = None,
    *,
    derive: bool = True,
) -> Iterator[None]:
    """Put a shard in place of the working weights (collective on the way in and on the way out).

    Masters that are separate from the working weights are not touched, nor is the optimizer, nor any random state.
    Inside, calls that would hand out the weights as the live ones, or replace them, are refused (`Swap.guard`).
    Writes that bypass these calls raise an error on exit, after the live weights are restored.

    Args:
        engine: provides the working weights.
        shard: (engine.numel,), fp32, host: this rank's elements.
        statistics: buffers to use with these weights, by clean name. Others stay as training has them.
        derive: whether to recompute what parametrizations derive from the weights.

    Raises:
        AveragingError: a swap is already active, LoRA adapters are merged into their base, or weights were changed
            inside.
    """
    if engine.swap.active:
        raise AveragingError(
            "averaged weights are swapped in already; expected one `swapped_in()` at a time: leave the first "
            "before entering the second"
        )
    if merged_layers(engine.module):
        raise AveragingError(
            "LoRA adapters are merged into the weights they adapt, so averaged adapters would change nothing; "
            "unmerge them first (model.unmerge_adapter())"
        )
    engine.swap.let_readers_finish()
    engine.release_gathered()
    buffers = changing_buffers(engine.module)
    # The weights of a wrapper that has not stepped yet may be no cast of its masters.
    if engine.masters_are_working() or engine.misplaced() is not None:
        engine.swap.stash = engine.read(engine.working())
    engine.swap.buffers = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    engine.swap.replaced = frozenset(map(id, engine.trainable.values()))
    try:
        _put_in(engine, shard)
        for name, values in (statistics or {}).items():
            buffers[name].copy_(values)
        if derive:
            derive_buffers(engine)
        written = engine.sum_of_working()
        engine.swap.guard(engine.module, engine.outer, engine.hands_out)
        yield
        error = _changed_inside(engine, written)
    except BaseException:
        # The error may be on this rank only. The others would then be waiting in another collective, and restoring,
        # which is collective too, would hang instead of letting the error out.
        if not engine.ranks.all_arrive():
            logger.error("the other ranks did not leave the swap; the live weights are not restored")
            raise
        _restore(engine)
        raise
    try:
        _restore(engine)
    except BaseException:
        # Ctrl-C, say. With one rank, restoring again costs nothing; with several, the others would not join it.
        if engine.ranks.world_size == 1:
            _restore(engine)
        raise
    engine.ranks.raise_together(error)


def _put_in(engine: Engine, shard: Tensor | None) -> None:
    """Let forwards see a shard from now on (None: the masters)."""
    engine.write(shard)
    engine.publish()
    torch.clear_autocast_cache()  # inside an outer autocast, forwards would use the casts of the weights before


def _changed_inside(engine: Engine, written: int) -> AveragingError | LayoutError | None:
    """The error, if the body has left the weights in a wrong state."""
    if merged_layers(engine.module):
        return AveragingError(
            "LoRA adapters were merged while averaged weights were swapped in, and not unmerged; they have been "
            "now, but rounding has changed the base slightly. Unmerge them before leaving `swapped_in()`"
        )
    try:
        engine.check_trainable()
        changed = engine.sum_of_working() != written
    except LayoutError as error:
        return error
    if not changed or rescales(engine.module):
        return None
    return AveragingError(
        "the weights were written to while averaged ones were swapped in, and what was written is lost: the live "
        "weights are back. Load or change weights outside of `swapped_in()`"
    )


@torch.no_grad()
def _restore(engine: Engine) -> None:
    for layer in merged_layers(engine.module):  # while the adapters still hold what was merged
        layer.unmerge()
    engine.release_gathered()
    _put_in(engine, engine.swap.stash)
    for name, buffer in changing_buffers(engine.module).items():
        if name in engine.swap.buffers:
            buffer.copy_(engine.swap.buffers[name])
    engine.swap.end()


def rescales(module: nn.Module) -> bool:
    """Whether a forward alone changes weights: an embedding with `max_norm` rescales its rows."""
    return any(getattr(part, "max_norm", None) is not None for part in module.modules())


@dataclass
class Swap:
    """The swap state of one module, shared by all engines that use it."""

    module: ReferenceType[nn.Module]
    """The module."""
    replaced: frozenset[int] = frozenset()
    """Ids of the parameters in whose place other weights are now, by a swap of this module."""
    stash: Tensor | None = None
    """The owned live elements while active, if the engine keeps no other copy of them."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the live values of buffers while active, by clean name."""
    readers: WeakSet[Pipeline] = field(default_factory=WeakSet)
    """What may still read the live weights; waited for before they are written."""
    _guards: ExitStack = field(default_factory=ExitStack)
    _lifted: bool = False

    @property
    def entered(self) -> bool:
        """Whether other weights have replaced the module's live ones by a swap of its own."""
        return bool(self.replaced)

    @property
    def active(self) -> bool:
        """Whether other weights have replaced live ones of the module, by its own swap or of a part that another
        module shares: what that one does not train, it has not replaced.
        """
        others = (swap.replaced for swap in list(_SWAPS.values()) if swap.entered)
        return self.entered or any(not self._parameters().isdisjoint(each) for each in others)

    def let_readers_finish(self) -> None:
        """Block until nothing reads the live weights any more."""
        for swap in filter(self._overlaps, list(_SWAPS.values())):
            for reader in swap.readers:
                reader.release_masters()

    def _overlaps(self, other: Swap) -> bool:
        """Whether the modules have parameters in common: they are the same, or one contains the other."""
        return self is other or not self._parameters().isdisjoint(other._parameters())

    def _parameters(self) -> set[int]:
        module = self.module()
        return set() if module is None else set(map(id, module.parameters()))

    def guard(self, module: nn.Module, outer: nn.Module, calls: Iterable[str]) -> None:
        """Refuse, until :meth:`end`, any call that hands out the weights as the live ones, or replaces them.

        These are `state_dict`, `load_state_dict` and pickling of every submodule. `copy.deepcopy` is allowed: the
        copy holds the average, and nothing is refused on it.

        Args:
            module: the model.
            outer: the engine around it, or the model itself.
            calls: methods of `outer` that access the weights without the module's `state_dict`.
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
        """Suspend the guard: for code that can tell the live weights from those in the module."""
        before, self._lifted = self._lifted, True
        try:
            yield
        finally:
            self._lifted = before

    def refuse(self, owner: str, call: str) -> None:
        """Raise the error for a call, unless the guard is lifted."""
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
        """End the swap: the live weights are back."""
        self._guards.close()
        self.replaced, self.stash, self.buffers = frozenset(), None, {}


class _Refusal:
    """A hook, or the replacement of a method: refuses to be called, and to be pickled along with its module."""

    def __init__(self, swap: Swap, owner: str, call: str):
        self._swap, self._owner, self._call = swap, owner, call

    def __call__(self, *_: object, **__: object) -> None:
        self._swap.refuse(self._owner, self._call)

    def __reduce__(self) -> NoReturn:
        raise AveragingError(
            f"a {self._owner} was pickled (torch.save, say) while averaged weights are swapped in, so they would "
            "pass for the live ones; leave `swapped_in()` first, or copy it with copy.deepcopy: that makes a "
            "model which holds the average"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


def _nothing(*_: object, **__: object) -> None:
    """Replaces a refusal in a copy of the module."""


_SWAPS: WeakKeyDictionary[nn.Module, Swap] = WeakKeyDictionary()


def swap_of(module: nn.Module) -> Swap:
    """The one `Swap` of an unwrapped module."""
    if module not in _SWAPS:
        _SWAPS[module] = Swap(ref(module))
        module.register_load_state_dict_pre_hook(_finish_reading)
    return _SWAPS[module]


def _finish_reading(module: nn.Module, *_: object) -> None:
    """Keep weights that are loaded from reaching a member that is still being read."""
    swap = _SWAPS.get(module)
    if swap is not None:
        swap.let_readers_finish()
