"""Batches of rows, and optimizer steps of several of them on several ranks that equal one on all rows at once.

A loss is a mean over the rows that count: target tokens of a model that writes, examples of one that classifies.
Engines take the mean of such means over micro-batches and ranks, which weighs a token the more, the fewer its
micro-batch has. So each micro-batch's loss is scaled to the share of the step's rows that it holds. Rows that
accelerate repeats at the end of an epoch, so that all ranks have equally many full micro-batches, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from swaft.noise.inputs import IGNORE_INDEX
from swaft.training.config import TrainConfig
from swaft.training.data.order import length_grouped, shuffled
from swaft.training.launch.interruption import leave_signals_to_the_rank

Collate = Callable[[list[Any]], dict[str, Any]]
"""Makes a batch of rows."""


def loader_of(
    rows: Dataset, collate: Collate, *, batch_size: int, num_workers: int, sampler: Sampler[int] | None = None
) -> DataLoader[Any]:
    """Return a loader that draws from no generator that training draws from, and whose workers outlive signals."""
    return DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=sampler,
        generator=torch.Generator(),  # from which workers' seeds are drawn
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_rank,
    )


def training_loader(
    rows: Dataset, collate: Collate, train: TrainConfig, *, world_size: int
) -> DataLoader[Any]:
    """Return a loader over the training rows, in an order that is the same on every rank and can begin anywhere."""
    batch_size, sampler = train.per_device_train_batch_size, shuffled(len(rows), seed=train.seed)
    if train.group_by_length:
        chunks = rows.select_columns("input_ids").iter(1000)
        lengths = [len(ids) for chunk in chunks for ids in chunk["input_ids"]]  # type: ignore[index]
        sampler = length_grouped(lengths, batch_size=batch_size * world_size, seed=train.seed)
    workers = train.dataloader_num_workers
    return loader_of(rows, collate, batch_size=batch_size, num_workers=workers, sampler=sampler)


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at once."""

    inputs: dict[str, Any]
    """Rows by column, each row once an epoch over all ranks. Where the others have the last of them, rows that this
    rank repeats, because all ranks have to take part in every pass."""
    count: Tensor
    """How many rows its loss is the mean of, 0-dim, on the batch's device; 0 for repeated rows."""


def step_batches(
    loader: DataLoader[Any], accumulation: int, *, epoch: int = 0, skip: int = 0
) -> Iterator[tuple[int, int, list[MicroBatch]]]:
    """Yield, epoch after epoch, the micro-batches of each optimizer step.

    They are ``accumulation`` many, and fewer in the last step of an epoch whose length it does not divide.

    Args:
        loader: whose order depends on the number of the epoch alone.
        accumulation: micro-batches of a step.
        epoch: number of the first epoch.
        skip: micro-batches to leave out of it.

    Yields:
        Number of the epoch, micro-batches read of it, those of this step included, and the micro-batches.
    """
    while True:
        if isinstance(loader, DataLoaderShard):
            loader.set_epoch(epoch)
        batches = enumerate(skip_first_batches(loader, skip) if skip else loader, start=skip)
        while step := list(islice(batches, accumulation)):
            skip += len(step)
            yield epoch, skip, [_own_part(batch, loader, number) for number, batch in step]
        epoch, skip = epoch + 1, 0


def _own_part(batch: Mapping[str, Any], loader: DataLoader[Any], number: int) -> MicroBatch:
    """Return a micro-batch, by its number in the epoch from 0, without the rows that are repeats.

    Ranks take a prepared loader's batches in turn, and accelerate fills the last ones with the first rows, after
    those that are the rank's own. Nothing is repeated where the ranks do not share the loader.
    """
    own, shared = None, getattr(loader, "batch_sampler", None)
    if isinstance(shared, BatchSamplerShard) and shared.batch_size is not None:
        first = (number * shared.num_processes + shared.process_index) * shared.batch_size
        own = min(max(len(loader.dataset) - first, 0), shared.batch_size)  # type: ignore[arg-type]
    if own == 0:
        return MicroBatch(dict(batch), torch.zeros_like(count_rows(batch)))
    inputs = {name: value[:own] for name, value in batch.items()}
    return MicroBatch(inputs, count_rows(inputs))


def count_rows(batch: Mapping[str, Any]) -> Tensor:
    """Return how many rows a batch's loss is the mean of, 0-dim, on the batch's device.

    Args:
        batch: ``labels`` (B,) or (B, T), class ids where IGNORE_INDEX does not count, or scores (floating point),
            which all do. Without labels (answers to questions) every example counts.
    """
    labels = batch.get("labels")
    if labels is None:
        first = next(iter(batch.values()))
        return torch.full(
            (), len(first), device=first.device
        )  # filled there; a copy would make the host wait
    if labels.is_floating_point():
        return torch.full((), labels.numel(), device=labels.device)
    return (labels != IGNORE_INDEX).sum()


def count_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return how many tokens of a batch are no padding, 0-dim: those read, and those to be written, if any."""
    read = batch.get("attention_mask", batch["input_ids"]).count_nonzero()
    labels = batch.get("labels")
    return read if labels is None or labels.dim() < 2 else read + (labels != IGNORE_INDEX).sum()


def loss_factors(counts: Sequence[Tensor], accelerator: Accelerator) -> Tensor:
    """Return the factor on each micro-batch's loss, so that the step's gradient is that of one mean (collective).

    The engines divide each loss by ``gradient_accumulation_steps`` and average gradients over ranks; the factors
    take both back. Equal counts give exactly 1, and the host waits for nothing.

    Args:
        counts: rows of each of this rank's micro-batches.
        accelerator: knows the ranks and the accumulation.

    Returns:
        (micro-batches,), fp32.
    """
    own = torch.stack(list(counts)).double()
    total: Any = accelerator.reduce(own.sum(), reduction="sum")
    means = accelerator.gradient_accumulation_steps * accelerator.num_processes
    return (own * means / total.clamp(min=1)).float()
