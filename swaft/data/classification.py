"""Turns rows of text and label into batches for a sequence classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from swaft.config.schema import DataConfig
from swaft.data.checks import (
    existing,
    refuse_non_text,
    refuse_repeated_ids,
    require_column,
    require_length,
    require_padding,
)
from swaft.data.labels import read_labels
from swaft.errors import DataError

# How GLUE and its kin call their text columns; pairs first, for some pairs contain a single's name.
USUAL_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
)
USUAL_LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class Task:
    """What a classification or regression task reads and predicts."""

    text_columns: tuple[str, ...]
    """One text column, or two for a pair."""
    label_column: str
    """Column with the answer."""
    num_labels: int
    """Number of classes; 1 for a regression."""
    label_names: list[str] | None
    """Names of the classes in order of their ids, where the data names them."""
    is_regression: bool
    """Whether the answer is a score rather than a class."""


def describe_task(splits: Mapping[str, Dataset], data: DataConfig) -> Task:
    """Find the columns of a task and what its labels are, and check them in every row of every split.

    Args:
        splits: rows by split, `train` among them.
        data: the section of the configuration; names columns where they are not the usual ones.

    Raises:
        DataError: a column that does not exist, a text that is none, a label that does not fit, or an id (column
            `id`) that several rows of a split have.
    """
    text_columns = _text_columns(splits["train"], data)
    label_column = _label_column(splits["train"], data)
    for name, split in splits.items():
        for column in (*text_columns, label_column):
            if column not in split.column_names:
                raise DataError(
                    f"the {name} split has no column '{column}', but train has; {existing(split)}"
                )
        for column in text_columns:
            refuse_non_text(split, name, column, "data.text_column")
        if "id" in split.column_names:
            refuse_repeated_ids(split, name)
    labels = read_labels(splits, label_column, do_regression=data.do_regression)
    return Task(
        text_columns=text_columns,
        label_column=label_column,
        num_labels=labels.num_labels,
        label_names=labels.label_names,
        is_regression=labels.is_regression,
    )


def tokenize(split: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Turn rows into what the model reads, unpadded.

    Args:
        split: rows of the task.
        task: what `describe_task` found.
        tokenizer: the model's tokenizer.
        max_seq_length: tokens a row is cut to, special tokens included; of a pair the longer text is cut.

    Returns:
        A dataset with `input_ids`, `attention_mask`, (`token_type_ids`), `labels` (class ids, or floats for
        a regression) and `idx`, the row number in `split`.

    Raises:
        DataError: the model does not read that many tokens.
    """
    require_length("data.max_seq_length", max_seq_length, tokenizer.model_max_length)
    ids = {name: i for i, name in enumerate(task.label_names or [])}

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts = [rows[column] for column in task.text_columns]
        pair = texts[1] if len(texts) == 2 else None
        encoded = dict(tokenizer(texts[0], pair, truncation=True, max_length=max_seq_length))
        labels = rows[task.label_column]
        if task.is_regression:
            encoded["labels"] = [float(label) for label in labels]
        else:
            encoded["labels"] = [ids[label] if isinstance(label, str) else int(label) for label in labels]
        encoded["idx"] = indices
        return encoded

    return split.map(encode, batched=True, with_indices=True, remove_columns=split.column_names)


class Collator:
    """Pads rows to the longest of the batch and stacks them.

    Args:
        tokenizer: the model's tokenizer.

    Raises:
        DataError: the tokenizer has no padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        require_padding(tokenizer)
        self._pad = DataCollatorWithPadding(tokenizer, padding="longest", return_tensors="pt")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch: token columns (B, L) int64, `labels` (B,) int64 or fp32, `idx` (B,) int64."""
        return dict(self._pad(list(rows)))


def _text_columns(train: Dataset, data: DataConfig) -> tuple[str, ...]:
    if data.text_column is not None:
        require_column(train, data.text_column, "data.text_column")
        if data.text_pair_column is None:
            return (data.text_column,)
        require_column(train, data.text_pair_column, "data.text_pair_column")
        return data.text_column, data.text_pair_column
    for columns in USUAL_TEXT_COLUMNS:
        if set(columns) <= set(train.column_names):
            return columns
    raise DataError(f"no column with a usual name for text; {existing(train)}; set data.text_column")


def _label_column(train: Dataset, data: DataConfig) -> str:
    if data.label_column is not None:
        require_column(train, data.label_column, "data.label_column")
        return data.label_column
    for column in USUAL_LABEL_COLUMNS:
        if column in train.column_names:
            return column
    raise DataError(f"no column named label or labels; {existing(train)}; set data.label_column")
