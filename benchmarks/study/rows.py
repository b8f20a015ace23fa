"""Rows of a task as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

MEGABATCH = 8
"""Number of batches whose rows are sorted by length together before being split, to keep padding small."""
EVALUATION_TOKENS = 2048
"""Most tokens in an evaluation batch, including padding."""


@dataclass(frozen=True)
class Rows:
    """Token ids of texts, and what is to be learned from them. Every field holds one entry per row."""

    ids: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[int, ...], ...]
    """Token type ids."""
    labels: Tensor
    """(N,) classes, int64; subclasses say what other tasks store here."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: np.ndarray) -> Self:
        """The rows at these indices, in this order."""
        places = [int(place) for place in chosen]

        def picked(entries: Any) -> Any:
            if isinstance(entries, Tensor):
                return entries[torch.tensor(places, dtype=torch.long)]
            return tuple(entries[place] for place in places)

        return replace(self, **{field.name: picked(getattr(self, field.name)) for field in fields(self)})

    def batch(self, places: np.ndarray) -> dict[str, Tensor]:
        """Keyword arguments of the model for the rows at these indices, padded to the longest of them."""
        rows = self.take(places)
        return rows.inputs() | {"labels": rows.labels}

    def inputs(self) -> dict[str, Tensor]:
        """The inputs of the model, without labels; (N, L) each."""
        mask = padded([(1,) * len(row) for row in self.ids])
        return {
            "input_ids": padded(self.ids),
            "attention_mask": mask,
            "token_type_ids": padded(self.segments),
        }


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Rows of numbers as one tensor (N, L), int64, shorter rows padded with ``value``."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )


def epoch_batches(rows: Rows, *, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row indices of each batch of an epoch: shuffled, with rows of similar length together."""
    generator = np.random.default_rng((seed, epoch))
    lengths = np.array([len(row) for row in rows.ids])
    order = generator.permutation(len(rows))
    batches = []
    for start in range(0, len(order), size * MEGABATCH):
        mega = order[start : start + size * MEGABATCH]
        mega = mega[np.argsort(lengths[mega], kind="stable")]
        batches += [mega[i : i + size] for i in range(0, len(mega), size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def evaluation_batches(rows: Rows) -> list[np.ndarray]:
    """Indices of all rows, in batches of similar length."""
    lengths = np.array([len(row) for row in rows.ids])
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and lengths[order[stop]] * (stop + 1 - start) <= EVALUATION_TOKENS:
            stop += 1
        batches.append(order[start:stop])
        start = stop
    return batches
