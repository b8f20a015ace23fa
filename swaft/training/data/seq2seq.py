"""Finds source and target texts in rows, and all references of a source; makes batches for an encoder-decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from swaft.errors import DataError
from swaft.training.data.checks import (
    Fault,
    existing,
    good_rows,
    is_blank,
    padding,
    refuse_repeated_ids,
    require_column,
    require_length,
    text_faults,
    values,
)
from swaft.training.data.texts import encode as encode_texts

logger = logging.getLogger(__name__)


# How the data sets of summarisation, dialogue and data-to-text call their columns.
USUAL_COLUMNS = (
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("meaning_representation", "human_reference"),
    ("source", "target"),
)
TRANSLATION = "translation"
"""Column that holds a text for each language, by its code."""
REFERENCES = "references"
"""Column that lists every right text of a row."""


@dataclass(frozen=True)
class PairColumns:
    """Where a generation task keeps its texts."""

    source_column: str
    """Column with the text to read."""
    target_column: str
    """Column with the text to write; the source's own for translations."""
    source_lang: str | None = None
    """Language to read, a key of the translation column; None: no translation."""
    target_lang: str | None = None
    """Language to write."""
    rows: Mapping[str, Dataset] = field(default_factory=dict, repr=False, compare=False)
    """Rows by split, without those that were left out."""


def find_pairs(
    splits: Mapping[str, Dataset],
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    skip_bad_rows: bool = False,
) -> PairColumns:
    """Find the columns of a generation task, and check them in every row of every split.

    Args:
        splits: rows by split, `train` among them.
        source_column: column, or language of the column `translation`; None: found by a usual name, as is the
            target; name both or none.
        target_column: as above.
        source_lang: language to read, where there is a column `translation` and no column is named; a model's
            code for it (en_XX) will do.
        target_lang: language to write.
        skip_bad_rows: leave out rows with a text that is none or empty, or a list of references without one.

    Raises:
        DataError: a column or language that does not exist or has to be named, a text that is none or
            empty, a list of references without one, or an id (column `id`) that several rows of a split have.
    """
    columns = _find(splits["train"], source_column, target_column, source_lang, target_lang)
    for name, split in splits.items():
        for column in dict.fromkeys((columns.source_column, columns.target_column)):
            if column not in split.column_names:
                raise DataError(
                    f"the {name} split has no column '{column}', but train has; {existing(split)}"
                )
    rows = good_rows(splits, partial(_faults, columns=columns), skip=skip_bad_rows)
    for name, split in rows.items():
        if "id" in split.column_names:
            refuse_repeated_ids(split, name)
    return replace(columns, rows=rows)


def read_pairs(split: Dataset, name: str, columns: PairColumns, *, group_references: bool = True) -> Dataset:
    """Return the rows as `source`, `target` and `references`, texts that may be scored against.

    References are the row's list (column `references`) where there is one, else the row's target alone. In
    the second case, rows outside train that share a source become one row with all their targets as
    references, in order of first appearance: to score a text against each of them alone would punish it
    for what the others say. The target, which labels are made of, is then the first of them. Translations
    keep their rows, as published scores do.

    Args:
        split: rows that `find_pairs` checked.
        name: what the split is called; `train` keeps its rows.
        columns: what `find_pairs` found.
        group_references: False keeps the rows of every split.
    """
    has_lists = REFERENCES in split.column_names

    def pair(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        sources, targets = rows[columns.source_column], rows[columns.target_column]
        if columns.source_lang is not None:
            sources = [texts[columns.source_lang] for texts in sources]
            targets = [texts[columns.target_lang] for texts in targets]
        references = rows[REFERENCES] if has_lists else [[target] for target in targets]
        return {"source": sources, "target": targets, "references": references}

    pairs = split.map(pair, batched=True, remove_columns=split.column_names)
    if name == "train" or has_lists or columns.source_lang is not None or not group_references:
        return pairs
    grouped = _group(pairs)
    if len(grouped) < len(pairs):
        logger.info(
            "%d rows of %s share %d sources: one row each, with all its references",
            len(pairs),
            name,
            len(grouped),
        )
    return grouped


def _find(
    train: Dataset,
    source_column: str | None,
    target_column: str | None,
    source_lang: str | None,
    target_lang: str | None,
) -> PairColumns:
    if (source_column is None) != (target_column is None):
        raise DataError(
            f"data.source_column is {source_column} and data.target_column is {target_column}; expected both or "
            f"none of them; {existing(train)}"
        )
    languages = _languages(train)
    if source_column is not None and target_column is not None:
        if {source_column, target_column} <= set(languages):
            return PairColumns(TRANSLATION, TRANSLATION, source_column, target_column)
        if source_column == target_column:
            raise DataError(
                f"data.source_column and data.target_column are both {source_column}; {existing(train)}; name two"
            )
        require_column(train, source_column, "data.source_column")
        require_column(train, target_column, "data.target_column")
        return PairColumns(source_column, target_column)
    if languages:
        found = (_language(languages, source_lang), _language(languages, target_lang))
        _check_languages(languages, (source_lang, target_lang), found)
        return PairColumns(TRANSLATION, TRANSLATION, *found)
    for source, target in USUAL_COLUMNS:
        if {source, target} <= set(train.column_names):
            return PairColumns(source, target)
    raise DataError(
        f"no pair of columns with usual names for source and target; {existing(train)}; set data.source_column "
        "and data.target_column"
    )


def _languages(train: Dataset) -> list[str]:
    if TRANSLATION not in train.column_names:
        return []
    # A column of this name may hold plain texts, too.
    return list(next((texts for texts in values(train, TRANSLATION) if isinstance(texts, Mapping)), ()))


def _language(languages: list[str], code: str | None) -> str | None:
    """Find the language that a code is of: itself, or what stands before its `_` (en_XX), as in transformers."""
    return next((name for name in (code, (code or "").split("_")[0]) if name in languages), None)


def _check_languages(
    languages: list[str], codes: tuple[str | None, str | None], found: tuple[str | None, str | None]
) -> None:
    there = f"the languages are {', '.join(languages)}"
    for which, code, language in zip(("source", "target"), codes, found, strict=True):
        if language is None:
            raise DataError(
                f"data.{which}_lang is {code}; {there}; name one of them (where the model calls it otherwise, name "
                f"the language of the rows as data.{which}_column)"
            )
    if found[0] == found[1]:
        raise DataError(f"data.source_lang and data.target_lang are both {found[0]}; {there}; name two")


def _faults(split: Dataset, columns: PairColumns) -> Iterator[Fault]:
    if columns.source_lang is not None:
        yield from _translation_faults(split, columns)
    else:
        yield from text_faults(split, columns.source_column)
        yield from text_faults(split, columns.target_column)
    if REFERENCES in split.column_names:
        yield from _reference_faults(split)


def _translation_faults(split: Dataset, columns: PairColumns) -> Iterator[Fault]:
    for row, texts in enumerate(values(split, columns.source_column)):
        for language in (columns.source_lang, columns.target_lang):
            text = (texts or {}).get(language)
            if not isinstance(text, str) or is_blank(text):
                yield row, f"has {text!r} as its text in '{language}'; expected words"


def _reference_faults(split: Dataset) -> Iterator[Fault]:
    for row, texts in enumerate(values(split, REFERENCES)):
        listed = isinstance(texts, list) and texts
        if not listed or not all(isinstance(text, str) and text.strip() for text in texts):
            yield (
                row,
                f"has {texts!r} in column '{REFERENCES}'; expected a list of one or more texts (rename the column "
                "if it is something else)",
            )


def _group(pairs: Dataset) -> Dataset:
    by_source: dict[str, dict[str, None]] = {}
    for source, target in zip(values(pairs, "source"), values(pairs, "target"), strict=True):
        by_source.setdefault(source, {})[target] = None  # a dict keeps each text once, in order
    return Dataset.from_dict(
        {
            "source": list(by_source),
            "target": [next(iter(targets)) for targets in by_source.values()],
            "references": [list(targets) for targets in by_source.values()],
        }
    )


IGNORED = -100
"""Label of positions that no loss counts."""


@dataclass(frozen=True)
class LengthStatistics:
    """How long the texts of a split are, in tokens with the special ones, before they are cut."""

    mean: float
    """Mean length."""
    p95: float
    """Length that 95 % of the texts do not exceed."""
    longest: int
    """Greatest length."""
    limit: int
    """Length that texts are cut to."""
    share_cut: float
    """Share of the texts that are longer than that, 0 to 1."""


def tokenize_pairs(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
    model_max_length: int | None = None,
) -> Dataset:
    """Turn pairs of texts into what an encoder-decoder reads, unpadded.

    Args:
        pairs: rows with `source` and `target`, from `read_pairs`.
        tokenizer: the model's tokenizer; targets are tokenized as such (`text_target`).
        max_source_length: tokens a source is cut to, prefix and special tokens included.
        max_target_length: tokens a target is cut to.
        source_prefix: put before every source; T5 is told its task so ("summarize: ").
        model_max_length: tokens the model reads at most; None: what its tokenizer says. Models with relative
            positions (T5) read more than that.

    Returns:
        A dataset with `input_ids`, `attention_mask`, (`token_type_ids`), `labels` (token ids), `idx`, the row
        number in `pairs`, and `source_length`, `target_length`: tokens before the cut.

    Raises:
        DataError: the model does not read that many tokens.
    """
    most = tokenizer.model_max_length if model_max_length is None else model_max_length
    require_length("data.max_source_length", max_source_length, most)
    require_length("data.max_target_length", max_target_length, most)

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        sources = [source_prefix + text for text in rows["source"]]
        encoded, source_lengths = _cut(
            lambda texts, **cut: encode_texts(tokenizer, texts, **cut), sources, max_source_length
        )
        targets, target_lengths = _cut(
            lambda texts, **cut: encode_texts(tokenizer, text_target=texts, **cut),
            rows["target"],
            max_target_length,
        )
        return encoded | {
            "labels": targets["input_ids"],
            "idx": indices,
            "source_length": source_lengths,
            "target_length": target_lengths,
        }

    return pairs.map(encode, batched=True, with_indices=True, remove_columns=pairs.column_names)


def length_statistics(lengths: Sequence[int], limit: int) -> LengthStatistics:
    """Sum up lengths for a report.

    Args:
        lengths: tokens of each text before the cut (`source_length` or `target_length`), one at least.
        limit: tokens they are cut to.
    """
    found = np.asarray(lengths)
    return LengthStatistics(
        mean=float(found.mean()),
        p95=float(np.percentile(found, 95)),
        longest=int(found.max()),
        limit=limit,
        share_cut=float(np.mean(found > limit)),
    )


class Seq2SeqCollator:
    """Pads sources and targets to the longest of the batch and stacks them.

    Args:
        tokenizer: the model's tokenizer.
        length: tokens that every source is padded to; None: to the longest of the batch.
        multiple: number that divides the length of every batch of sources.

    Raises:
        DataError: the tokenizer has no padding token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int | None = None, multiple: int | None = None
    ):
        self._pad = padding(tokenizer, length, multiple)
        self._inputs = frozenset(tokenizer.model_input_names) | {"idx"}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch, all int64.

        Token columns are (B, S), padded on the tokenizer's side; `labels` (B, T), padded on the right with -100;
        `idx` (B,).
        """
        inputs = [{name: value for name, value in row.items() if name in self._inputs} for row in rows]
        batch: dict[str, Tensor] = dict(self._pad(inputs))
        labels = [torch.as_tensor(row["labels"], dtype=torch.int64) for row in rows]
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return batch


def _cut(
    tokenize: Callable[..., Any], texts: list[str], limit: int
) -> tuple[dict[str, list[list[int]]], list[int]]:
    """Tokenize texts; those that are too long a second time, cut. So the first lengths are known."""
    encoded = dict(tokenize(texts, verbose=False))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    long = [row for row, length in enumerate(lengths) if length > limit]
    if long:
        shortened = tokenize([texts[row] for row in long], truncation=True, max_length=limit)
        for name, column in encoded.items():
            for row, values in zip(long, shortened[name], strict=True):
                column[row] = values
    return encoded, lengths
