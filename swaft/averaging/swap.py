"""Averaged weights in place of the working weights for a while, and the live ones back, whatever happens inside.

No backup copy is kept where the working weights are a cast of separate masters: they are cast again. Only where
masters and weights are one does a stash stand in, sharded over the ranks like the average. Buffers that training
changes are copied, and put back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from swaft.averaging.adapters import merged_layers
from swaft.averaging.buffers import changing_buffers, derive_buffers
from swaft.averaging.engines import Engine
from swaft.averaging.engines.base import rescales
from swaft.errors import AveragingError, LayoutError

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

    The masters and the optimizer are not touched where they are apart from the working weights. Random state
    is not touched at all. Inside, whatever would hand out the weights as the live ones, or replace them, is refused
    (`Swap.guard`); what is written past those calls is refused on the way out, when the live weights are back.

    Args:
        engine: whose working weights.
        shard: (engine.numel,), fp32, host: this rank's elements.
        statistics: buffers that go with these weights, by clean name. Others stay as training has them.
        derive: whether what parametrizations derive from weights is derived anew from these.

    Raises:
        AveragingError: a swap is active already, LoRA adapters are merged into their base, or weights were changed
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
    engine.swap.stash = _needed_stash(engine)
    engine.swap.buffers = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    engine.swap.active = True
    try:
        engine.write(shard)
        engine.publish()
        for name, values in (statistics or {}).items():
            buffers[name].copy_(values)
        if derive:
            derive_buffers(engine)
        written = engine.sum_of_working()
        engine.swap.guard(engine.module, engine.outer, engine.hands_out)
        yield
        error = _changed_inside(engine, written)
    except BaseException:
        # The error may be this rank's alone. The others would then wait in a collective of their own, and
        # restoring, which is collective too, would hang instead of letting the error out.
        if not engine.ranks.all_arrive():
            logger.error("the other ranks did not leave the swap; the live weights are not restored")
            raise
        _restore(engine)
        raise
    try:
        _restore(engine)
    except BaseException:
        # Ctrl-C, say. Alone, once more costs nothing; among ranks it would be a collective that others do not join.
        if engine.ranks.world_size == 1:
            _restore(engine)
        raise
    engine.ranks.raise_together(error)


def _needed_stash(engine: Engine) -> Tensor | None:
    if engine.masters_are_working():
        return engine.read(engine.masters())
    # A wrapper that has not stepped yet may hold working weights that are no cast of its masters.
    return None if engine.working_is_cast() else engine.read(engine.working())


def _changed_inside(engine: Engine, written: int) -> AveragingError | LayoutError | None:
    """What is wrong with the weights as the body leaves them."""
    if merged_layers(engine.module):
        return AveragingError(
            "LoRA adapters were merged while averaged weights were swapped in, and not unmerged; they have been "
            "now, which leaves the base changed by rounding. Unmerge them before `swapped_in()` is left"
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
    for layer in merged_layers(engine.module):  # while the adapters are those that were merged
        layer.unmerge()
    engine.release_gathered()
    if engine.swap.stash is None:
        engine.recast()
    else:
        engine.write(engine.swap.stash)
    engine.publish()
    for name, buffer in changing_buffers(engine.module).items():
        if name in engine.swap.buffers:
            buffer.copy_(engine.swap.buffers[name])
    engine.swap.end()
