"""Averaged weights in place of the working weights for a while, and the live ones back, whatever happens inside.

No backup copy is kept where the working weights are a cast of separate masters: they are cast again. Only where
masters and weights are one does a stash stand in, sharded over the ranks like the average.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from swaft.averaging.engines import Engine
from swaft.errors import AveragingError

logger = logging.getLogger(__name__)


@contextmanager
def swapped_in(engine: Engine, shard: Tensor) -> Iterator[None]:
    """Put a shard in place of the working weights (collective on the way in and on the way out).

    The masters and the optimizer are not touched where they are apart from the working weights. Random state
    is not touched at all.

    Args:
        engine: whose working weights.
        shard: (engine.numel,), fp32, host: this rank's elements.

    Raises:
        AveragingError: a swap is active already.
    """
    if engine.swap.active:
        raise AveragingError(
            "averaged weights are swapped in already; expected one `swapped_in()` at a time: leave the first "
            "before entering the second"
        )
    engine.swap.let_readers_finish()
    engine.release_gathered()
    engine.swap.stash = _needed_stash(engine)
    engine.swap.active = True
    try:
        engine.write(shard)
        engine.publish()
        yield
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


def _needed_stash(engine: Engine) -> Tensor | None:
    if engine.masters_are_working():
        return engine.read(engine.masters())
    # A wrapper that has not stepped yet may hold working weights that are no cast of its masters.
    return None if engine.working_is_cast() else engine.read(engine.working())


def _restore(engine: Engine) -> None:
    engine.release_gathered()
    if engine.swap.stash is None:
        engine.recast()
    else:
        engine.write(engine.swap.stash)
    engine.publish()
    engine.swap.active, engine.swap.stash = False, None
