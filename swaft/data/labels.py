"""Reads the answers of a task: what kind they are, which classes there are, and that every row has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from swaft.errors import DataError

MOST_UNNAMED_CLASSES = 1000
"""Classes that unnamed ids may ask for whatever the number of rows; more is taken for some other number."""


@dataclass(frozen=True)
class Labels:
    """What the label column of a task holds."""

    num_labels: int
    """Number of classes; 1 for a regression."""
    label_names: list[str] | None
    """Names of the classes in order of their ids, where the data names them."""
    is_regression: bool
    """Whether the labels are scores."""


def read_labels(splits: Mapping[str, Dataset], column: str, *, do_regression: bool | None = None) -> Labels:
    """Read the labels of a task, and check every row of every split.

    Fractional numbers are scores. Text is a class, its id the place in the sorted texts of the training
    rows. A whole number is a class id; how many there are is what the column's type says, else the
    largest of the training rows plus one. Whole numbers stored as fractional ones (1.0) may be either.

    Args:
        splits: rows by split, `train` among them.
        column: the label column, present in every split.
        do_regression: whether numbers are scores (True) or class ids (False); None: as above.

    Raises:
        DataError: labels that may be either, a row without a label, or with one that no training row has;
            names split and row.
    """
    values = {name: split[column][:] for name, split in splits.items()}
    for name, rows in values.items():
        _refuse_missing(rows, name, column)
    kinds = {name: _kind(rows, name, column) for name, rows in values.items()}
    for name, kind in kinds.items():
        # Whole numbers among scores are scores: a small split may hold no fraction.
        if kind is not kinds["train"] and not (kinds["train"] is float and kind is int):
            raise DataError(
                f"column '{column}' holds {_said(kinds['train'])} in train but {_said(kind)} in {name}; "
                "expected the same kind in every split"
            )
    if kinds["train"] is str:
        return _read_names(values, column)
    if kinds["train"] is float and do_regression is None and _are_whole(values["train"]):
        raise DataError(
            f"column '{column}' holds whole numbers stored as fractional ones ({values['train'][0]}, ...): class "
            "ids or scores? Set data.do_regression=false for classes, data.do_regression=true for scores"
        )
    if do_regression or (do_regression is None and kinds["train"] is float):
        return Labels(num_labels=1, label_names=None, is_regression=True)
    for name, rows in values.items():
        if not _are_whole(rows):
            raise DataError(
                f"column '{column}' of {name} holds fractional numbers, which are no class ids; "
                "set data.do_regression=true"
            )
    return _read_ids(splits, values, column)


def _are_whole(rows: list[Any]) -> bool:
    return bool((np.asarray(rows, dtype=np.float64) % 1 == 0).all())


def _read_names(values: Mapping[str, list[str]], column: str) -> Labels:
    known = set(values["train"])
    names = sorted(known)
    for split, rows in values.items():
        for row, value in enumerate(rows):
            if value not in known:
                raise DataError(
                    f"row {row} of {split} has {column}={value!r}, which no training row has; expected "
                    f"one of {_shortened(names)} (data.max_train_samples may cut labels off)"
                )
    return Labels(num_labels=_several(len(names), column), label_names=names, is_regression=False)


def _read_ids(splits: Mapping[str, Dataset], values: Mapping[str, list[int]], column: str) -> Labels:
    names = _class_names(splits, column)
    num_labels = len(names) if names is not None else int(max(values["train"])) + 1
    if names is None and num_labels > max(MOST_UNNAMED_CLASSES, len(values["train"])):
        row = int(np.argmax(values["train"]))
        raise DataError(
            f"row {row} of train has {column}={num_labels - 1}, which would make {num_labels} classes of "
            f"{len(values['train'])} rows; expected class ids counted from 0. Name another column with "
            "data.label_column"
        )
    for split, rows in values.items():
        ids = np.asarray(rows, dtype=np.int64)
        outside = np.flatnonzero((ids < 0) | (ids >= num_labels))
        if len(outside):
            row, source = outside[0], "training rows" if names is None else "column type"
            raise DataError(
                f"row {row} of {split} has {column}={ids[row]}; expected 0 to {num_labels - 1}, the labels "
                f"of the {source} (-1 usually marks a row without its answer: leave such a split out)"
            )
    return Labels(num_labels=_several(num_labels, column), label_names=names, is_regression=False)


def _class_names(splits: Mapping[str, Dataset], column: str) -> list[str] | None:
    features = {name: split.features[column] for name, split in splits.items()}
    named = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for name, names in named.items():
        if names != named.get("train"):
            raise DataError(
                f"column '{column}' names its classes {_shortened(names)} in {name} but "
                f"{_shortened(named.get('train') or ['(no names)'])} in train, so an id means two things"
            )
    return named.get("train")


def _refuse_missing(rows: list[Any], split: str, column: str) -> None:
    for row, value in enumerate(rows):
        if value is None or value != value:  # NaN alone differs from itself
            raise DataError(f"row {row} of {split} has no {column} ({value}); remove the row or fill it in")


def _kind(rows: list[Any], split: str, column: str) -> type:
    for kind, members in ((int, (int, bool)), (float, (int, float)), (str, (str,))):
        if all(isinstance(value, members) for value in rows):
            return kind
    odd = next(type(value).__name__ for value in rows)
    raise DataError(
        f"column '{column}' of {split} holds {odd} values; expected class ids, texts or scores. Name another "
        "column with data.label_column"
    )


def _several(num_labels: int, column: str) -> int:
    if num_labels < 2:
        raise DataError(
            f"every training row has the same {column}: there is nothing to classify. Name another column "
            "with data.label_column, or raise data.max_train_samples"
        )
    return num_labels


def _said(kind: type) -> str:
    return {int: "whole numbers", float: "fractional numbers", str: "texts"}[kind]


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
