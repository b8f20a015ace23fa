"""Rows of the classification tasks, drawn by a seed, and batches of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.study.pack import model_folder, packed, read_packed

MAX_LENGTH = 64
"""Tokens of a text, or of a pair, after which it is cut off."""
VALIDATION_ROWS = 300
TEST_ROWS = 700
MEGABATCH = 8
"""Batches of which the rows are sorted by length before they are cut into batches, so that little is padding."""
EVALUATION_TOKENS = 2048
"""Tokens of a batch without gradient, padding included."""


@dataclass(frozen=True)
class Task:
    """A folder of parquet files, and how it is scored."""

    name: str
    columns: tuple[str, ...]
    """One column of texts, or two."""
    score: str = "accuracy"
    """The task's own score: accuracy, mcc or f1."""
    test: str = "test"
    """The split whose rows are reported."""
    length: int = 1
    """Epochs, as a multiple of the regime's."""


TASKS = {
    task.name: task
    for task in (
        Task("trec", ("text",)),
        Task("cr", ("text",)),
        Task("sst2", ("sentence",)),
        # After the epochs of the others, half of the 77 classes are still taken for one another.
        Task("banking77", ("text",), length=3),
        # cola has no test rows: its validation rows are the test, and others are cut from its training rows.
        Task("cola", ("sentence",), "mcc", "validation"),
        Task("subj", ("text",)),
        Task("mpqa", ("text",)),
        Task("mrpc", ("sentence1", "sentence2"), "f1"),
    )
}


@dataclass(frozen=True)
class Rows:
    """Token ids of texts, and their classes."""

    ids: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[int, ...], ...]
    """Token type ids."""
    labels: Tensor
    """(N,), int64."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: np.ndarray) -> Rows:
        """The rows at these places, in this order."""
        places = [int(place) for place in chosen]
        return Rows(
            tuple(self.ids[place] for place in places),
            tuple(self.segments[place] for place in places),
            self.labels[torch.tensor(places, dtype=torch.long)],
        )

    def batch(self, places: np.ndarray) -> dict[str, Tensor]:
        """Keyword arguments of the model for the rows at these places, padded to the longest of them."""
        rows = self.take(places)
        longest = max(map(len, rows.ids))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask, segments = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (row, segment) in enumerate(zip(rows.ids, rows.segments, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            segments[i, : len(row)] = torch.tensor(segment)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments, "labels": rows.labels}


@dataclass(frozen=True)
class Splits:
    """The rows of one cell."""

    train: Rows
    validation: Rows
    """Rows by which anything is chosen; they are never reported."""
    test: Rows
    num_labels: int


def load(name: str, *, rows: int, seed: int) -> Splits:
    """Read a task, and draw its training rows.

    Validation and test rows are the same for every seed, the first so many of a fixed shuffle.

    Args:
        name: of the task.
        rows: training rows, or all where there are fewer.
        seed: by which they are drawn.

    Raises:
        FileNotFoundError: the task's folder is not there.
    """
    task = TASKS[name]
    pool, test = read(name, "train"), read(name, task.test)
    num_labels = int(pool.labels.max()) + 1
    if task.test == "validation":
        order = np.random.default_rng(0).permutation(len(pool))
        validation, pool = pool.take(order[:VALIDATION_ROWS]), pool.take(order[VALIDATION_ROWS:])
    else:
        validation = _first(read(name, "validation"), VALIDATION_ROWS)
    drawn = np.random.default_rng(seed).permutation(len(pool))[:rows]
    return Splits(pool.take(drawn), validation, _first(test, TEST_ROWS), num_labels)


def epoch_batches(rows: Rows, *, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Places of the rows of each batch of an epoch: shuffled, with rows of like length together."""
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
    """Places of all rows, in batches of like length."""
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


def data_folder() -> Path:
    """Folder of task folders: `$SWAFT_DATA`, else ../shared/data beside here."""
    return Path(os.environ.get("SWAFT_DATA", "../shared/data"))


def _first(rows: Rows, count: int) -> Rows:
    return rows.take(np.random.default_rng(0).permutation(len(rows))[:count])


@lru_cache(maxsize=6)
def read(name: str, split: str) -> Rows:
    """Every row of a split, from the pack where there is one.

    Raises:
        FileNotFoundError: the task's folder is not there.
    """
    if packed() is not None:
        ids, segments, labels = read_packed(name, split)
        return Rows(tuple(ids), tuple(segments), torch.tensor(labels))
    import pyarrow.parquet as parquet

    task, path = TASKS[name], data_folder() / name / f"{split}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"task {name} has no file {path}; expected a folder of task folders: set SWAFT_DATA"
        )
    table = parquet.read_table(path)
    columns = [table.column(column).to_pylist() for column in task.columns]
    encoded = _tokenizer()(*columns, truncation=True, max_length=MAX_LENGTH)
    segments = encoded["token_type_ids"]
    labels = torch.tensor(table.column("label").to_pylist(), dtype=torch.long)
    return Rows(tuple(map(tuple, encoded["input_ids"])), tuple(map(tuple, segments)), labels)


@lru_cache(maxsize=1)
def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())
