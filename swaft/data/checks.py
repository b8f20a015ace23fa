"""What every kind of task checks of its columns and of the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from swaft.errors import DataError

ROWS_AT_ONCE = 1_000
"""Rows read in one go: much faster than one by one, and still little memory."""


def values(split: Dataset, column: str) -> Iterator[Any]:
    """Yield the values of a column, row by row."""
    for first in range(0, len(split), ROWS_AT_ONCE):
        yield from split[column][first : first + ROWS_AT_ONCE]


def require_column(split: Dataset, column: str, setting: str) -> None:
    """Refuse a column that was named by a setting and does not exist.

    Raises:
        DataError: as said; lists the columns and names the nearest.
    """
    if column in split.column_names:
        return
    near = get_close_matches(column, split.column_names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise DataError(f"{setting}: there is no column '{column}'; {existing(split)}.{hint}")


def refuse_non_text(split: Dataset, name: str, column: str, setting: str | None = None) -> None:
    """Refuse a column that holds anything but text.

    Args:
        split: the rows.
        name: what the split is called.
        column: one of its columns.
        setting: what names another column; None: nothing does.

    Raises:
        DataError: names the first row without a text.
    """
    for row, value in enumerate(values(split, column)):
        if not isinstance(value, str):
            found = "nothing" if value is None else f"{value!r}"
            mend = f", or name another column with {setting}" if setting else " or fill it in"
            raise DataError(
                f"row {row} of {name} has {found} in column '{column}'; expected text. Remove the row{mend}"
            )


def refuse_blank(split: Dataset, name: str, column: str) -> None:
    """Refuse texts of nothing but white space.

    Raises:
        DataError: names the first.
    """
    for row, text in enumerate(values(split, column)):
        if not text.strip():
            raise DataError(
                f"row {row} of {name} has an empty text in column '{column}'; expected words. Remove the row or "
                "fill it in"
            )


def refuse_repeated_ids(split: Dataset, name: str, column: str = "id") -> None:
    """Refuse rows that share an id.

    Raises:
        DataError: says how many, and names one.
    """
    repeated = [row_id for row_id, count in Counter(values(split, column)).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} values of column '{column}' stand in several rows of {name} ({repeated[0]!r}, ...); "
            "expected one row an id. Remove the repeated rows, or rename the column if it is no id"
        )


def require_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a padding token.

    Raises:
        DataError: as said.
    """
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no padding token, so rows of different length cannot share "
            "a batch; set model.tokenizer_name to a tokenizer that has one"
        )


def require_length(setting: str, length: int, most: int) -> None:
    """Refuse texts that are cut to more tokens than the model reads.

    Args:
        setting: what says the length.
        length: tokens that texts are cut to.
        most: tokens that the model reads.

    Raises:
        DataError: with both numbers.
    """
    if length > most:
        raise DataError(f"{setting} is {length}, but the model reads at most {most} tokens; lower it")


def existing(split: Dataset) -> str:
    """Say which columns there are."""
    return f"the columns are {', '.join(split.column_names)}"
