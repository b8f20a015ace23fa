"""What all tasks do with their rows: check them, tokenize texts, batch token ids.

Only tokens that the tokenizer adds to a text are special, whatever the text spells.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import groupby, takewhile
from operator import itemgetter
from string import ascii_letters, digits
from typing import Any

import torch
from datasets import Dataset, Json
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from swaft.errors import DataError
from swaft.noise.inputs import IGNORE_INDEX
from swaft.options import suggestion

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1_000
"""Rows read in one go: much faster than one by one, and still little memory."""
SHAPELESS = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Unicode categories of spaces and breaks, and of control and format characters."""

BadRow = tuple[int, str]
"""Index of a row that cannot be used, and what is wrong with it: "has nothing in column 'text'; expected text"."""
TEXTS = ("string", "large_string", "string_view", "null")
"""Types of columns that hold texts, or nothing."""


class ColumnFault(str):
    """What is wrong with a whole column, so that leaving out rows does not help."""


def number_of(row: int) -> int:
    """Return a row's number in messages: from 1, as people and files count."""
    return row + 1


def values(split: Dataset, *columns: str) -> Iterator[Any]:
    """Yield the values of a column, or tuples of the values of several columns, row by row."""
    for first in range(0, len(split), ROWS_AT_ONCE):
        read = [split[column][first : first + ROWS_AT_ONCE] for column in columns]
        yield from read[0] if len(columns) == 1 else zip(*read, strict=True)


def tuples(split: Dataset, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield a tuple of the values of these columns, one or several, row by row."""
    return zip(*(values(split, column) for column in columns), strict=True)


def require_column(split: Dataset, column: str, setting: str) -> None:
    """Refuse a setting's column if it does not exist.

    Raises:
        DataError: lists the columns and suggests the nearest.
    """
    if column not in split.column_names:
        hint = suggestion(column, split.column_names)
        raise DataError(f"{setting}: there is no column '{column}'; {existing(split)}.{hint}")


def named_columns(split: Dataset, data: Any, *settings: str) -> tuple[str, ...]:
    """Return the columns given by these settings of section ``data``, up to the first setting that is None.

    Raises:
        DataError: a column does not exist.
    """
    columns = tuple(takewhile(lambda column: column is not None, (getattr(data, name) for name in settings)))
    for setting, column in zip(settings, columns, strict=False):
        require_column(split, column, f"data.{setting}")
    return columns


def usual_columns(split: Dataset, usual: Sequence[tuple[str, ...]], otherwise: str) -> tuple[str, ...]:
    """Return the first tuple of these columns that all exist.

    Raises:
        DataError: ``otherwise``, with the existing columns in place of its ``{}``.
    """
    for columns in usual:
        if set(columns) <= set(split.column_names):
            return columns
    raise DataError(otherwise.format(existing(split)))


def text_faults(split: Dataset, column: str, *, blank: bool = True) -> Iterator[BadRow]:
    """Yield the rows without a text in a column, and (``blank``) those with only white space.

    A column that holds anything else yields a `ColumnFault`.
    """
    feature = split.features[column]
    if getattr(feature, "dtype", "") not in TEXTS:
        there = ((row, each) for row, each in enumerate(values(split, column)) if each is not None)
        # Json decodes a text such as "7" to a number, so its rows may all look like texts, or none.
        if first := min(there, key=lambda each: isinstance(each[1], str), default=None):
            row, value = first
            found = f"has {value!r:.80} in column '{column}'; expected text"
            read = f"the column was read as {_taken_for(feature, value)}"
            yield row, ColumnFault(f"{found}, but {read}")
    for row, value in enumerate(values(split, column)):
        if value is None:
            yield row, f"has nothing in column '{column}'; expected text"
        elif blank and is_blank(value):
            yield row, f"has an empty text in column '{column}'; expected words"


def _taken_for(feature: Any, value: Any) -> str:
    """Say what a column was read as instead of text, and how to write it so that it is read as text."""
    if isinstance(feature, Json):
        return "values of several types; write each as text"
    if isinstance(value, Mapping | list):
        mend = "texts, and one object per row: df.to_json(FILE, orient='records', lines=True)"
    elif isinstance(value, bytes):
        mend = "them as decoded text"
    elif isinstance(value, date):
        mend = "the texts as parquet, which distinguishes them from dates"
    else:
        mend = "the texts as json lines, in quotation marks, or as parquet: csv cannot tell them from numbers"
    return f"values of type {type(value).__name__}; write {mend}"


def is_blank(text: str) -> bool:
    """Whether a text has only white space and invisible characters, which become no token."""
    return all(unicodedata.category(character) in SHAPELESS for character in text)


def good_rows(
    splits: Mapping[str, Dataset],
    columns: Sequence[str],
    find_faults: Callable[[Dataset], Iterator[BadRow]],
    *,
    skip: bool,
) -> dict[str, Dataset]:
    """Return the rows without a fault; log which are left out.

    Args:
        splits: rows by split, `train` among them.
        columns: columns that every split must have.
        find_faults: yields the faults of a split.
        skip: leave out bad rows (`data.skip_bad_rows`), and splits but train that have no good row; False: refuse.

    Raises:
        DataError: a missing column, or one of the wrong type; the first bad row, if none are left out; or no
            training row left.
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
            if isinstance(fault, ColumnFault):
                raise DataError(f"row {number_of(row)} of {name} {fault}")
            if not skip:
                raise DataError(
                    f"row {number_of(row)} of {name} {fault}. Remove the row (they count from 1) or fill it in, or "
                    "leave such rows out with data.skip_bad_rows=true"
                )
            faults.setdefault(row, fault)
        if not faults:
            kept[name] = split
            continue
        first = min(faults)
        found = f"row {number_of(first)} {faults[first]}"
        if len(faults) == len(split) and name == "train":
            raise DataError(f"no row of train is left: all are bad ({found})")
        left_out = shortened([str(number_of(row)) for row in sorted(faults)])
        logger.info(
            "%d of %d rows of %s are left out: %s (%s)", len(faults), len(split), name, left_out, found
        )
        if len(faults) < len(split):
            kept[name] = split.select([row for row in range(len(split)) if row not in faults])
    return kept


def require_length(setting: str, length: int, most: int) -> None:
    """Refuse a length in tokens that exceeds what the model can read."""
    if length > most:
        raise DataError(f"{setting} is {length}, but the model reads at most {most} tokens; lower it")


def shortened(names: list[str]) -> str:
    """Join the first few names."""
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def existing(split: Dataset) -> str:
    """Say which columns there are."""
    return f"the columns are {', '.join(split.column_names)}"


IGNORED = IGNORE_INDEX
"""Label of positions that the loss ignores."""
POSITIONS = ("start_positions", "end_positions")
"""Columns with the first and the last token of an answer."""


class Collator:
    """Pads rows and stacks them: inputs on the tokenizer's padding side, labels of token ids on the right.

    Args:
        tokenizer: the model's, which determines the padding token and side.
        length: tokens that every row is padded to; None: to the longest of the batch.
        multiple: pad every batch to a multiple of this length.

    Raises:
        DataError: the tokenizer has no padding token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int | None = None, multiple: int | None = None
    ):
        if tokenizer.pad_token_id is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no padding token, so rows of different length cannot share "
                "a batch; set model.tokenizer_name to a tokenizer that has one"
            )
        self.padding: Any = tokenizer.pad_token_id
        self._names = frozenset((*tokenizer.model_input_names, "labels", *POSITIONS, "idx"))
        self._pads_left = tokenizer.padding_side == "left"
        self._pad = DataCollatorWithPadding(
            tokenizer,
            padding="longest" if length is None else "max_length",
            max_length=length,
            pad_to_multiple_of=multiple,
        )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch: token columns and labels (B, L) int64, others (B,) int64, or fp32 for fractions."""
        # transformers' DataCollatorForSeq2Seq would pad labels to the length or multiple meant for inputs.
        writes = isinstance(rows[0].get("labels"), list)
        names = self._names - {"labels"} if writes else self._names
        batch = dict(self._pad([{name: row[name] for name in row if name in names} for row in rows]))
        if writes:
            batch["labels"] = padded(rows, "labels", IGNORED)
        if self._pads_left and POSITIONS[0] in batch:  # the tokens have moved
            lengths = batch["idx"].new_tensor([len(row["input_ids"]) for row in rows])
            batch |= {name: batch[name] + batch["input_ids"].shape[1] - lengths for name in POSITIONS}
        return batch


def padded(rows: Sequence[Mapping[str, Any]], name: str, value: int) -> Tensor:
    """Return a column of token ids, (B, L) int64, padded on the right."""
    columns = [torch.as_tensor(row[name], dtype=torch.int64) for row in rows]
    return pad_sequence(columns, batch_first=True, padding_value=value)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the id of every special token: also of those that are special as added tokens only.

    Most tokens of chat templates are: Llama's `<|eot_id|>`, Mistral's `[INST]`.
    """
    added = {str(each): token for token, each in tokenizer.added_tokens_decoder.items() if each.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def spelled_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that finds the special tokens that a text spells, the longest first."""
    return re.compile(_any_of({*special_tokens(tokenizer)}) or "(?!)")


def _any_of(names: set[str]) -> str:
    """Return a pattern that branches by character: Mistral's thousand tokens would be tried at every bracket."""
    branches = [
        re.escape(first) + _any_of({name[1:] for name in alike})
        for first, alike in groupby(sorted(names - {""}), key=itemgetter(0))
    ]
    return f"(?:{'|'.join(branches)})" + "?" * ("" in names) if branches else ""


def read_as_text(tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool) -> None:
    """Set whether a special token spelled in a text is read as text; the setting is saved with the tokenizer."""
    tokenizer.split_special_tokens = split_special_tokens
    if _can_split(tokenizer):
        tokenizer.init_kwargs["split_special_tokens"] = split_special_tokens


def encode(tokenizer: PreTrainedTokenizerBase, *texts: Any, **options: Any) -> BatchEncoding:
    """Tokenize a batch of texts or pairs.

    If special tokens are read as text (see `read_as_text`), those that the tokenizer cannot split become the
    unknown token: words of its vocabulary, as in T5's, and all special tokens of a slow tokenizer with added words.
    A token used only for padding is left alone: some tokenizers pad with a word ("!"), and the attention mask tells
    the two apart.

    Args:
        tokenizer: the model's.
        texts: one list of texts, or two for pairs.
        options: options for the tokenizer's call.

    Returns:
        What the tokenizer returns, including lists of `input_ids`.

    Raises:
        DataError: such a word, if the tokenizer has no unknown token.
    """
    if not tokenizer.split_special_tokens:
        return tokenizer(*texts, **options)
    encoded = tokenizer(
        *texts, split_special_tokens=_can_split(tokenizer), return_special_tokens_mask=True, **options
    )
    unknown: Any = tokenizer.unk_token_id
    padding: Any = tokenizer.pad_token_id
    names = set(tokenizer.special_tokens_map) - {"pad_token", "unk_token"}
    meant = {getattr(tokenizer, f"{name}_id") for name in names}
    special = frozenset(special_tokens(tokenizer).values()) - ({unknown, padding} - meant)
    for ids, added in zip(encoded["input_ids"], encoded.pop("special_tokens_mask"), strict=True):
        if sum(map(special.__contains__, ids)) == sum(added):  # nearly always, and quick to check
            continue
        added = added[-len(ids) :]  # ByT5 adds no end token to a text that ends by spelling one
        for position, (token, was_added) in enumerate(zip(ids, added, strict=True)):
            if token in special and not was_added:
                if unknown is None:
                    raise DataError(
                        f"a text spells {tokenizer.convert_ids_to_tokens(token)}, which is a word of "
                        f"{type(tokenizer).__name__}, and there is no unknown token to put in its place; "
                        "remove it from the texts, or set data.split_special_tokens=false"
                    )
                ids[position] = unknown
    return encoded


def without_letters(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool]:
    """Return a test for texts without a letter or digit that the tokenizer knows; they may become no token."""
    known = {
        letter
        for letter in ascii_letters + digits
        if tokenizer(letter, add_special_tokens=False)["input_ids"]
    }
    return known.isdisjoint


def refuse_rows_without_tokens(splits: Mapping[str, Dataset], columns: Sequence[str], tokenizer: Any) -> None:
    """Refuse texts that become no token at all if the tokenizer adds none (GPT-2, Qwen): no model can read them.

    The tokenizer takes the texts of these columns, one or two, together.

    Raises:
        DataError: names the row.
    """
    if tokenizer(*[""] * len(columns))["input_ids"]:
        return
    is_doubtful = without_letters(tokenizer)
    for name, split in splits.items():
        for row, texts in enumerate(tuples(split, columns)):
            if all(map(is_doubtful, texts)) and not tokenizer(*texts)["input_ids"]:
                found = "an empty text" if all(map(is_blank, texts)) else f"the text {texts[0]!r}"
                raise DataError(
                    f"row {number_of(row)} of {name} has {found}, which {type(tokenizer).__name__} turns into no "
                    "token. Remove the row or fill it in, or leave such rows out with data.skip_bad_rows=true"
                )


def report_special_tokens(
    splits: Mapping[str, Dataset], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log in how many rows a text spells a special token, and how it is read.

    Raises:
        DataError: `encode` refuses such a text.
    """
    spelled = spelled_tokens(tokenizer)
    read = "are text" if tokenizer.split_special_tokens else "have their special meaning"
    other = str(not tokenizer.split_special_tokens).lower()
    for name, split in splits.items():
        found = [
            (number_of(row), match.group(), texts)
            for row, texts in enumerate(tuples(split, columns))
            if (match := next(filter(None, map(spelled.search, texts)), None))
        ]
        if not found:
            continue
        logger.warning(
            "%d rows of %s spell special tokens (row %d: %s), which %s; "
            "set data.split_special_tokens=%s to change that",
            *(len(found), name, *found[0][:2], read, other),
        )
        encode(tokenizer, [text for *_, texts in found for text in texts], verbose=False)


def refuse_split_settings(tokenizer: PreTrainedTokenizerBase, data: Any, *settings: str) -> None:
    """Refuse special tokens in settings that hold a text to put around every row, if they would be read as text.

    A setting spells a token on purpose, and the saved tokenizer may read it as special again.

    Args:
        tokenizer: the model's, after `read_as_text`.
        data: section ``data``.
        settings: its settings to check.

    Raises:
        DataError: names the setting.
    """
    for name in settings:
        text = getattr(data, name)
        if not tokenizer.split_special_tokens or not text:
            continue
        meant = tokenizer([text], split_special_tokens=False)["input_ids"]
        if encode(tokenizer, [text])["input_ids"] != meant:
            raise DataError(
                f"data.{name} is {text!r}, whose special tokens would be read as plain text; set "
                "data.split_special_tokens=false, which applies to the rows as well, or take the tokens out"
            )


def _can_split(tokenizer: Any) -> bool:
    if not isinstance(tokenizer, PreTrainedTokenizer):
        # mistral-common's, which is neither, never reads special tokens from a text.
        return isinstance(tokenizer, PreTrainedTokenizerFast)
    # Slow tokenizers would also lose words that were added to them; in ESM's, all words were.
    added = set(map(str, tokenizer.added_tokens_decoder.values()))
    return added <= special_tokens(tokenizer).keys() and not hasattr(tokenizer, "unique_no_split_tokens")
