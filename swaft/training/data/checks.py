"""What every kind of task checks of its rows."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from datasets import Dataset

from swaft.errors import DataError
from swaft.options import suggestion

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1_000
"""Rows read in one go: much faster than one by one, and still little memory."""
SHAPELESS = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Categories of Unicode: spaces and breaks, and characters that control or format."""

Fault = tuple[int, str]
"""Number of a row that cannot be used, and what is wrong with it: "has nothing in column 'text'; expected text"."""


def values(split: Dataset, *columns: str) -> Iterator[Any]:
    """Yield the values of a column, or tuples of those of several, row by row."""
    for first in range(0, len(split), ROWS_AT_ONCE):
        read = [split[column][first : first + ROWS_AT_ONCE] for column in columns]
        yield from read[0] if len(columns) == 1 else zip(*read, strict=True)


def require_column(split: Dataset, column: str, setting: str) -> None:
    """Refuse a column that a setting names and that does not exist.

    Raises:
        DataError: lists the columns and names the nearest.
    """
    if column not in split.column_names:
        hint = suggestion(column, split.column_names)
        raise DataError(f"{setting}: there is no column '{column}'; {existing(split)}.{hint}")


def named_columns(split: Dataset, data: Any, *settings: str) -> tuple[str, ...]:
    """Return the columns that these settings of section ``data`` name, up to the first that names none.

    Raises:
        DataError: one that does not exist.
    """
    columns = tuple(takewhile(lambda column: column is not None, (getattr(data, name) for name in settings)))
    for setting, column in zip(settings, columns, strict=False):
        require_column(split, column, f"data.{setting}")
    return columns


def usual_columns(split: Dataset, usual: Sequence[tuple[str, ...]], otherwise: str) -> tuple[str, ...]:
    """Return the first of these columns that all exist.

    Raises:
        DataError: ``otherwise``, with the columns there are in the place of its ``{}``.
    """
    for columns in usual:
        if set(columns) <= set(split.column_names):
            return columns
    raise DataError(otherwise.format(existing(split)))


def text_faults(split: Dataset, column: str, *, blank: bool = True) -> Iterator[Fault]:
    """Yield the rows that have anything but text in a column, and (``blank``) those with white space alone."""
    for row, value in enumerate(values(split, column)):
        if not isinstance(value, str):
            found = "nothing" if value is None else f"{value!r}"
            yield row, f"has {found} in column '{column}'; expected text"
        elif blank and is_blank(value):
            yield row, f"has an empty text in column '{column}'; expected words"


def is_blank(text: str) -> bool:
    """Whether a text has nothing but white space and characters without a shape, of which no token is made."""
    return all(unicodedata.category(character) in SHAPELESS for character in text)


def good_rows(
    splits: Mapping[str, Dataset],
    columns: Sequence[str],
    find_faults: Callable[[Dataset], Iterator[Fault]],
    *,
    skip: bool,
) -> dict[str, Dataset]:
    """Return the rows without a fault; what is left out is logged.

    Args:
        splits: rows by split, `train` among them.
        columns: that every split has to have.
        find_faults: yields the faults of a split.
        skip: leave rows out (`data.skip_bad_rows`), and a split that has no other ones but train; False: refuse.

    Raises:
        DataError: a missing column; the first row with a fault, where none is left out; no training row that is
            left; or an id (column `id`) that several rows of a split have.
    """
    for name, split in splits.items():
        for column in columns:
            if column not in split.column_names:
                but = ", but train has" if column in splits["train"].column_names else ""
                raise DataError(
                    f"the {name} split has no column '{column}'{but}; {existing(split)}; expected "
                    f"{', '.join(dict.fromkeys(columns))}"
                )
    kept = {}
    for name, split in splits.items():
        faults: dict[int, str] = {}
        for row, fault in find_faults(split):
            if not skip:
                raise DataError(
                    f"row {row} of {name} {fault}. Remove the row or fill it in, or leave such rows out with "
                    "data.skip_bad_rows=true"
                )
            faults.setdefault(row, fault)
        if faults:
            first = min(faults)
            if len(faults) == len(split) and name == "train":
                raise DataError(f"no row of train is left: each is a bad one (row {first} {faults[first]})")
            left_out = shortened([str(number) for number in sorted(faults)])
            logger.info(
                "%d of %d rows of %s are left out: %s (row %d %s)",
                *(len(faults), len(split), name, left_out, first, faults[first]),
            )
        if not faults:
            kept[name] = split
        elif len(faults) < len(split):
            kept[name] = split.select([row for row in range(len(split)) if row not in faults])
    for name, split in kept.items():
        if "id" in split.column_names:
            _refuse_repeated_ids(split, name)
    return kept


def require_length(setting: str, length: int, most: int) -> None:
    """Refuse a length in tokens that is more than the model reads at most."""
    if length > most:
        raise DataError(f"{setting} is {length}, but the model reads at most {most} tokens; lower it")


def shortened(names: list[str]) -> str:
    """Join the first few names."""
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def existing(split: Dataset) -> str:
    """Say which columns there are."""
    return f"the columns are {', '.join(split.column_names)}"


def _refuse_repeated_ids(split: Dataset, name: str) -> None:
    repeated = [row_id for row_id, count in Counter(values(split, "id")).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} values of column 'id' stand in several rows of {name} ({repeated[0]!r}, ...); "
            "expected one row an id. Remove the repeated rows, or rename the column if it is no id"
        )
