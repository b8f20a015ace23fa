"""Loaders of batches: in an order that can be begun anywhere, and that signals do not break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from swaft.training.config import TrainConfig
from swaft.training.data.order import length_grouped, shuffled
from swaft.training.launch.interruption import InterruptibleLoader, Interruption, leave_signals_to_the_rank


def training_loader(
    dataset: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    train: TrainConfig,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """Return a loader over the training rows, not yet prepared, in an order that is the same on every rank."""
    sampler = shuffled(len(dataset), seed=train.seed)
    if train.group_by_length:
        chunks = dataset.select_columns("input_ids").iter(1000)
        lengths = [len(ids) for chunk in chunks for ids in chunk["input_ids"]]  # type: ignore[index]
        batch_size = train.per_device_train_batch_size * accelerator.num_processes
        sampler = length_grouped(lengths, batch_size=batch_size, seed=train.seed)
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=train.per_device_train_batch_size,
        sampler=sampler,
        generator=torch.Generator(),  # so that workers' seeds are not drawn from the one that training draws from
        collate_fn=collate,
        num_workers=train.dataloader_num_workers,
        worker_init_fn=leave_signals_to_the_rank,
    )


def evaluation_loader(
    dataset: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    accelerator: Accelerator,
    interruption: Interruption,
    *,
    batch_size: int,
    num_workers: int,
) -> Any:
    """Return a loader over every row, which draws from no generator that training draws from, and can be ended."""
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=batch_size,
        generator=torch.Generator(),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_rank,
    )
    return InterruptibleLoader(accelerator.prepare_data_loader(loader), interruption)
