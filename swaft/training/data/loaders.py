"""Loaders of batches: the order of training rows, which depends only on the seed and the number of the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from swaft.training.config import TrainConfig
from swaft.training.launch.interruption import leave_signals_to_the_rank

Order = Callable[[torch.Generator], Sequence[int]]
"""Draws the rows of one pass."""


class PassSampler(Sampler[int]):
    """Yields every row once per pass, each pass in its own order, whatever was drawn before.

    So a run may start with any pass, and every rank knows its order without communication.

    Args:
        order: draws the rows of one pass.
        num_rows: rows in a pass.
        seed: seed of all passes; the same on every rank.
    """

    def __init__(self, order: Order, num_rows: int, *, seed: int):
        self.epoch = 0
        """Number of the next pass."""
        self._order, self._num_rows, self._seed = order, num_rows, seed

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next pass; accelerate's loaders do so before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows in a pass."""
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of one pass, and move on to the next."""
        # torch's generators take 32 bits of a seed, and seed + epoch would repeat passes of runs with other seeds.
        mixed = int(np.random.SeedSequence((self._seed, self.epoch)).generate_state(1)[0])
        self.epoch += 1
        yield from self._order(torch.Generator().manual_seed(mixed))


def shuffled(num_rows: int, *, seed: int) -> PassSampler:
    """Return a sampler of all rows, shuffled."""
    return PassSampler(
        lambda generator: torch.randperm(num_rows, generator=generator).tolist(), num_rows, seed=seed
    )


def length_grouped(lengths: Sequence[int], *, batch_size: int, seed: int) -> PassSampler:
    """Return a sampler of all rows in which a batch holds inputs of similar length, with little padding.

    Each pass is shuffled, then sorted by length within stretches of 50 batches (or a quarter of the rows, if that
    is less); the longest row comes first, so a batch that does not fit in memory fails at once.

    Args:
        lengths: tokens of each input.
        batch_size: rows of a micro-batch over all devices.
        seed: seed of the orders.
    """
    return PassSampler(
        lambda generator: get_length_grouped_indices(lengths, batch_size, generator=generator),
        len(lengths),
        seed=seed,
    )


Collate = Callable[[list[Any]], dict[str, Any]]
"""Makes a batch from rows."""


def loader_of(
    rows: Dataset,
    collate: Collate,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    sampler: Sampler[int] | None = None,
) -> DataLoader[Any]:
    """Return a loader that does not use training's random generators, and whose workers outlive signals."""
    return DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=sampler,
        generator=torch.Generator(),  # the source of the workers' seeds
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_rank,
        pin_memory=device.type == "cuda",  # else the host waits for every copy, and for all before it
    )


def training_loader(
    rows: Dataset, collate: Collate, train: TrainConfig, *, world_size: int, device: torch.device
) -> DataLoader[Any]:
    """Return a loader over the training rows, in an order that is the same on every rank and can start anywhere."""
    batch_size, sampler = train.per_device_train_batch_size, shuffled(len(rows), seed=train.seed)
    if train.group_by_length:
        chunks = rows.select_columns("input_ids").iter(1000)
        lengths = [len(ids) for chunk in chunks for ids in chunk["input_ids"]]  # type: ignore[index]
        sampler = length_grouped(lengths, batch_size=batch_size * world_size, seed=train.seed)
    workers = train.dataloader_num_workers
    return loader_of(
        rows, collate, batch_size=batch_size, num_workers=workers, device=device, sampler=sampler
    )
