"""Optimizer steps of several micro-batches on several ranks that equal one step on all their rows at once.

A loss is a mean over the rows that count: target tokens of a model that writes, examples of one that classifies.
Engines take the mean of such means over micro-batches and ranks, which weighs a token the more, the fewer its
micro-batch has. So each micro-batch's loss is scaled to the share of the step's rows that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader

from swaft.noise.inputs import IGNORE_INDEX


def step_batches(
    loader: DataLoader[Any], accumulation: int, *, epoch: int = 0, skip: int = 0
) -> Iterator[tuple[int, int, list[Any]]]:
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
        batches = iter(skip_first_batches(loader, skip) if skip else loader)
        while step := list(islice(batches, accumulation)):
            skip += len(step)
            yield epoch, skip, step
        epoch, skip = epoch + 1, 0


def count_rows(batch: Mapping[str, Any]) -> Tensor:
    """Return how many rows a batch's loss is the mean of, 0-dim, on the batch's device.

    Args:
        batch: ``labels`` (B,) or (B, T), class ids where IGNORE_INDEX does not count, or scores (floating point),
            which all do. Without labels (answers to questions) every example counts.
    """
    labels = batch.get("labels")
    if labels is None:
        first = next(iter(batch.values()))
        return torch.tensor(len(first), device=first.device)
    if labels.is_floating_point():
        return torch.tensor(labels.numel(), device=labels.device)
    return (labels != IGNORE_INDEX).sum()


def loss_factors(counts: Sequence[Tensor], accelerator: Accelerator) -> Tensor:
    """Return the factor on each micro-batch's loss, so that the step's gradient is that of one mean (collective).

    The engines divide each loss by ``gradient_accumulation_steps`` and average gradients over ranks; the factors
    take both back. Equal counts give exactly 1, and the host waits for nothing.

    Args:
        counts: rows of each of this rank's micro-batches, from `count_rows`.
        accelerator: knows the ranks and the accumulation.

    Returns:
        (micro-batches,), fp32.
    """
    own = torch.stack(list(counts)).double()
    total: Any = accelerator.reduce(own.sum(), reduction="sum")
    means = accelerator.gradient_accumulation_steps * accelerator.num_processes
    return (own * means / total.clamp(min=1)).float()
