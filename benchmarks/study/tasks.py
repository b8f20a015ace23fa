"""The tasks: their rows, sampled by seed, the model each starts from, and how it is scored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.study import answers, texts
from benchmarks.study import model as encoder
from benchmarks.study.outcomes import Prediction, outcomes
from benchmarks.study.pack import model_folder, packed, read_packed, read_vocabulary
from benchmarks.study.rows import Rows

MAX_LENGTH = 64
"""Tokens after which a text to be classified, or a pair, is truncated."""
VALIDATION_ROWS = 300
TEST_ROWS = 700


@dataclass(frozen=True)
class Task:
    """A folder of parquet files, and how it is scored."""

    name: str
    columns: tuple[str, ...]
    """One column of texts, or two; for text generation, source and target."""
    score: str = "accuracy"
    """The task's own score: accuracy, mcc or f1 for classes, f1 for answers, bleu for generated texts."""
    test: str = "test"
    """The split whose rows are reported."""
    length: int = 1
    """Epochs, as a multiple of the regime's."""
    rows: int = 1
    """Training rows, as a multiple of the regime's."""
    kind: str = "classes"
    """classes, answers, or texts from a `new` model or an `encoder`: texts-new, texts-encoder."""
    folder: str = ""
    """The task's folder, if it is not named after the task."""

    @property
    def generates(self) -> bool:
        """Whether it scores generated texts."""
        return self.kind.startswith("texts")


TASKS = {
    task.name: task
    for task in (
        Task("trec", ("text",)),
        Task("cr", ("text",)),
        Task("sst2", ("sentence",)),
        # With as many epochs as the other tasks, half of the 77 classes are still confused.
        Task("banking77", ("text",), length=3),
        # cola has no test rows: its validation rows serve as test, and part of its training rows as validation.
        Task("cola", ("sentence",), "mcc", "validation"),
        Task("subj", ("text",)),
        Task("mpqa", ("text",)),
        Task("mrpc", ("sentence1", "sentence2"), "f1"),
        Task("squad", ("question", "context", "answers"), "f1", length=2, kind="answers"),
        *(
            Task(
                f"{folder.split('_')[0]}-{begun}",
                columns,
                "bleu",
                length=2,
                rows=4,
                kind=f"texts-{begun}",
                folder=folder,
            )
            for folder, columns in (
                ("e2e", ("meaning_representation", "human_reference")),
                ("tatoeba_en_fr", ("en", "fr")),
            )
            for begun in ("new", "encoder")
        ),
    )
}


@dataclass(frozen=True)
class Splits:
    """The rows of one cell."""

    train: Rows
    validation: Rows
    """Rows used for every choice; they are never reported."""
    test: Rows
    num_labels: int


def load(name: str, *, rows: int, seed: int) -> Splits:
    """Read a task, and sample its training rows.

    Validation and test rows are the same for every seed: the first ones of a fixed shuffle.

    Args:
        name: of the task.
        rows: number of training rows; all of them if there are fewer.
        seed: seed of the sample.

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


def new_model(task: Task, splits: Splits, seed: int, device: torch.device) -> nn.Module:
    """The model that a task's training starts from; its new weights come from the seed."""
    if task.kind == "classes":
        return encoder.pretrained(splits.num_labels, seed, device)
    if task.kind == "answers":
        return answers.new_model(seed, device)
    return texts.new_model(seed, device, pretrained=task.kind == "texts-encoder")


def predict(task: Task, model: nn.Module, rows: Any) -> Prediction:
    """Predictions of the current weights for some rows."""
    if task.generates:
        return texts.predict(model, rows, vocabulary(task.name))
    if task.kind == "answers":
        return answers.predict(model, rows)
    logits = encoder.logits_of(model, rows)
    return Prediction(logits, rows.labels, score=lambda: outcomes(logits, rows.labels, task.score))


def data_folder() -> Path:
    """Folder of task folders: `$SWAFT_DATA`, else ../shared/data."""
    return Path(os.environ.get("SWAFT_DATA", "../shared/data"))


def _first(rows: Rows, count: int) -> Rows:
    return rows.take(np.random.default_rng(0).permutation(len(rows))[:count])


@lru_cache(maxsize=64)
def read(name: str, split: str) -> Any:
    """Every row of a split, from the pack if there is one.

    Raises:
        FileNotFoundError: the task's folder is not there.
    """
    task = TASKS[name]
    if packed() is not None:
        kind = {"classes": Rows, "answers": answers.Questions}.get(task.kind, texts.Pairs)
        return read_packed(name, split, kind)
    columns = _columns(task, split)
    if task.generates:
        target = vocabulary(name)

        def in_vocabulary(some: list[str]) -> list[list[int]]:
            return [found.ids for found in target.encode_batch(some)]

        def in_encoder(some: list[str]) -> list[list[int]]:
            return _tokenizer()(some, truncation=True, max_length=texts.MAX_LENGTH)["input_ids"]

        source = in_vocabulary if task.kind == "texts-new" else in_encoder
        return texts.read(*columns, split=split, source=source, target=in_vocabulary)
    if task.kind == "answers":
        return answers.read(dict(zip(task.columns, columns, strict=True)), _tokenizer())
    *texts_read, labels = columns
    encoded = _tokenizer()(*texts_read, truncation=True, max_length=MAX_LENGTH)
    segments = encoded["token_type_ids"]
    return Rows(
        tuple(map(tuple, encoded["input_ids"])),
        tuple(map(tuple, segments)),
        torch.tensor(labels, dtype=torch.long),
    )


@lru_cache(maxsize=4)
def vocabulary(name: str) -> Any:
    """Tokenizer for a task's generated texts, trained on both sides of its training rows, or from the pack."""
    if packed() is not None:
        return read_vocabulary(name)
    sources, targets = _columns(TASKS[name], "train")
    return texts.new_vocabulary([*sources, *targets])


def _columns(task: Task, split: str) -> Sequence[list[Any]]:
    """The task's columns, and the classes if it has any."""
    import pyarrow.parquet as parquet

    path = data_folder() / (task.folder or task.name) / f"{split}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"task {task.name} has no file {path}; expected a folder of task folders: set SWAFT_DATA"
        )
    table = parquet.read_table(path)
    if "translation" in table.column_names:
        pairs = table.column("translation").to_pylist()
        return [[pair[language] for pair in pairs] for language in task.columns]
    names = (*task.columns, *(("label",) if task.kind == "classes" else ()))
    return [table.column(name).to_pylist() for name in names]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())
