"""What every kind of task checks of its columns and of the tokenizer."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from swaft.errors import DataError

logger = logging.getLogger(__name__)

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


SHAPELESS = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Categories of Unicode: spaces and breaks, and characters that control or format."""
Fault = tuple[int, str]
"""Number of a row that cannot be used, and what is wrong with it: "has nothing in column 'text'; expected text"."""


def text_faults(split: Dataset, column: str, *, blank: bool = True) -> Iterator[Fault]:
    """Yield the rows that have anything but text in a column, and those with nothing but white space.

    Args:
        split: the rows.
        column: one of its columns.
        blank: whether white space alone is a fault.
    """
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
    splits: Mapping[str, Dataset], find_faults: Callable[[Dataset], Iterator[Fault]], *, skip: bool
) -> dict[str, Dataset]:
    """Return the rows without a fault; what is left out is logged.

    Args:
        splits: rows by split.
        find_faults: yields the faults of a split.
        skip: leave rows out (`data.skip_bad_rows`), and a split that has no other ones but train; False: refuse.

    Raises:
        DataError: names the first row with a fault, where none is left out; or no training row is left.
    """
    kept = {}
    for name, split in splits.items():
        if not skip:
            for row, fault in find_faults(split):
                raise DataError(
                    f"row {row} of {name} {fault}. Remove the row or fill it in, or leave such rows out with "
                    "data.skip_bad_rows=true"
                )
        faults = dict(find_faults(split)) if skip else {}
        if faults and len(faults) == len(split) and name == "train":
            raise DataError(f"no row of train is left: each is a bad one (row 0 {faults[0]})")
        if not faults:
            kept[name] = split
            continue
        if len(faults) < len(split):
            kept[name] = split.select([row for row in range(len(split)) if row not in faults])
        row = min(faults)
        logger.info(
            "%d of %d rows of %s are left out: %s (row %d %s)",
            len(faults),
            len(split),
            name,
            shortened([str(number) for number in sorted(faults)]),
            row,
            faults[row],
        )
    return kept


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


def padding(
    tokenizer: PreTrainedTokenizerBase, length: int | None = None, multiple: int | None = None
) -> DataCollatorWithPadding:
    """Return what pads rows of token ids and stacks them.

    Args:
        tokenizer: the model's, which says with what and on which side.
        length: tokens that every row is padded to; None: to the longest of the batch.
        multiple: number that divides the length of every batch.

    Raises:
        DataError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no padding token, so rows of different length cannot share "
            "a batch; set model.tokenizer_name to a tokenizer that has one"
        )
    strategy = "longest" if length is None else "max_length"
    lengths: dict[str, Any] = {"max_length": length, "pad_to_multiple_of": multiple}
    return DataCollatorWithPadding(tokenizer, padding=strategy, return_tensors="pt", **lengths)


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


def shortened(names: list[str]) -> str:
    """Join the first few names."""
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def existing(split: Dataset) -> str:
    """Say which columns there are."""
    return f"the columns are {', '.join(split.column_names)}"
