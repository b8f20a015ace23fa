"""Turns rows of text and label into what a sequence classifier reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from swaft.errors import DataError
from swaft.training.config.schema import DataConfig
from swaft.training.data.checks import (
    Fault,
    existing,
    good_rows,
    require_column,
    text_faults,
)
from swaft.training.data.labels import Labels, label_faults, read_labels
from swaft.training.data.texts import encode as encode_texts

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


@dataclass(frozen=True, kw_only=True)
class Task(Labels):
    """What a classification or regression task reads and predicts."""

    text_columns: tuple[str, ...]
    """One text column, or two for a pair."""
    label_column: str
    """Column with the answer."""
    rows: Mapping[str, Dataset] = field(default_factory=dict, repr=False)
    """Rows by split, without those that were left out."""


def describe_task(splits: Mapping[str, Dataset], data: DataConfig) -> Task:
    """Find the columns of a task and what its labels are, and check them in every row of every split.

    Bad rows are left out where `data.skip_bad_rows` asks for it: without a label, or with a text that is none or
    blank.

    Args:
        splits: rows by split, `train` among them.
        data: the section of the configuration; names columns where they are not the usual ones.

    Raises:
        DataError: a column that does not exist, a text that is none, a label that does not fit, or an id (column
            `id`) that several rows of a split have.
    """
    train = splits["train"]
    text_columns = _named(train, data, "text_column", "text_pair_column") or _usual_texts(train)
    [label_column] = _named(train, data, "label_column") or [_usual_label(train)]

    def faults(split: Dataset) -> Iterator[Fault]:
        for column in text_columns:  # most tokenizers make something of a blank text, which can be classified
            yield from text_faults(split, column, blank=data.skip_bad_rows)
        yield from label_faults(split, label_column)

    rows = good_rows(splits, (*text_columns, label_column), faults, skip=data.skip_bad_rows)
    labels = read_labels(rows, label_column, do_regression=data.do_regression)
    return Task(text_columns=text_columns, label_column=label_column, rows=rows, **vars(labels))


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
    """

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts = [rows[column] for column in task.text_columns]
        encoded = dict(encode_texts(tokenizer, *texts, truncation=True, max_length=max_seq_length))
        label_of = float if task.is_regression else task.label_ids.__getitem__
        return encoded | {"labels": list(map(label_of, rows[task.label_column])), "idx": indices}

    return split.map(encode, batched=True, with_indices=True, remove_columns=split.column_names)


def _named(train: Dataset, data: DataConfig, *settings: str) -> tuple[str, ...]:
    """Return the columns that these settings name, up to the first that names none."""
    named: tuple[str, ...] = ()
    for setting in settings:
        column = getattr(data, setting)
        if column is None:
            break
        require_column(train, column, f"data.{setting}")
        named += (column,)
    return named


def _usual_texts(train: Dataset) -> tuple[str, ...]:
    for columns in USUAL_TEXT_COLUMNS:
        if set(columns) <= set(train.column_names):
            return columns
    raise DataError(f"no column with a usual name for text; {existing(train)}; set data.text_column")


def _usual_label(train: Dataset) -> str:
    for column in USUAL_LABEL_COLUMNS:
        if column in train.column_names:
            return column
    raise DataError(f"no column named label or labels; {existing(train)}; set data.label_column")
