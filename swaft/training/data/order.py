"""The order in which training rows come: a function of the seed and the number of the pass, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

Order = Callable[[torch.Generator], Sequence[int]]
"""Draws the rows of one pass."""


class PassSampler(Sampler[int]):
    """Yields every row once a pass, each pass in an order of its own, whatever was drawn before.

    So a run may begin with any pass, and every rank knows its order without being told.

    Args:
        order: draws the rows of one pass.
        num_rows: of a pass.
        seed: of all passes; every rank needs the same.
    """

    def __init__(self, order: Order, num_rows: int, *, seed: int):
        self.epoch = 0
        """Number of the next pass."""
        self._order, self._num_rows, self._seed = order, num_rows, seed

    def set_epoch(self, epoch: int) -> None:
        """Name the next pass; accelerate's loaders do so before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Rows of a pass."""
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of one pass; the next one is another, if nobody names it."""
        # torch's generators take 32 bits of a seed, so that seed + epoch would be other runs' passes.
        mixed = int(np.random.SeedSequence((self._seed, self.epoch)).generate_state(1)[0])
        self.epoch += 1
        yield from self._order(torch.Generator().manual_seed(mixed))


def shuffled(num_rows: int, *, seed: int) -> PassSampler:
    """Return a sampler of all rows, shuffled."""
    return PassSampler(
        lambda generator: torch.randperm(num_rows, generator=generator).tolist(), num_rows, seed=seed
    )


def length_grouped(lengths: Sequence[int], *, batch_size: int, seed: int) -> PassSampler:
    """Return a sampler of all rows, so that a batch holds inputs of like length and little of it is padding.

    Each pass is shuffled, then sorted by length within stretches of 50 batches (or a quarter of the rows, if that
    is less); the longest row comes first, so a batch that does not fit the memory fails at once.

    Args:
        lengths: tokens of each input.
        batch_size: rows of a micro-batch over all devices.
        seed: of the orders.
    """
    each = list(lengths)
    draw = partial(get_length_grouped_indices, each, batch_size)
    return PassSampler(lambda generator: draw(generator=generator), len(each), seed=seed)
