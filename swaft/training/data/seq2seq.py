"""Finds source and target texts in rows, and all references of a source; makes batches for an encoder-decoder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from swaft.training.config.seq2seq import Seq2SeqDataConfig
from swaft.training.data.checks import (
    Fault,
    existing,
    good_rows,
    is_blank,
    named_columns,
    text_faults,
    usual_columns,
    values,
)
from swaft.training.data.texts import IGNORED, Collator
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
    """Column with the text to generate; the source's own for translations."""
    source_lang: str | None = None
    """Language to read, a key of the translation column; None: no translation."""
    target_lang: str | None = None
    """Language to generate."""
    rows: Mapping[str, Dataset] = field(default_factory=dict, repr=False, compare=False)
    """Rows by split, without those that were left out."""


def find_pairs(splits: Mapping[str, Dataset], data: Seq2SeqDataConfig) -> PairColumns:
    """Find the columns of a generation task, and check them in every row of every split.

    Args:
        splits: rows by split, `train` among them.
        data: the section of the configuration; names columns, or languages of the column `translation`, where they
            are not the usual ones. A model's code for a language (en_XX) will do.

    Raises:
        DataError: a column or language that does not exist or has to be named, a text that is none or
            empty, a list of references without one, or an id (column `id`) that several rows of a split have.
    """
    columns = _find(splits["train"], data)
    names = (columns.source_column, columns.target_column)
    rows = good_rows(splits, names, partial(_faults, columns=columns), skip=data.skip_bad_rows)
    return replace(columns, rows=rows)


def read_pairs(split: Dataset, name: str, columns: PairColumns) -> Dataset:
    """Return the rows as `source`, `target` and `references`, texts that may be scored against.

    References are the row's list (column `references`) where there is one, else the row's target alone. In
    the second case, rows outside train that share a source become one row with all their targets as
    references, in order of first appearance: to score a text against each of them alone would punish it
    for what the others say. The target, which labels are made of, is then the first of them. Translations
    keep their rows, as published scores do.
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
    if name == "train" or has_lists or columns.source_lang is not None:
        return pairs
    by_source: dict[str, dict[str, None]] = {}  # a dict keeps each text once, in order
    for source, target in values(pairs, "source", "target"):
        by_source.setdefault(source, {})[target] = None
    if len(by_source) == len(pairs):
        return pairs
    logger.info(
        "%d rows of %s share %d sources: one row each, with all its references",
        *(len(pairs), name, len(by_source)),
    )
    all_targets = list(map(list, by_source.values()))
    first = [texts[0] for texts in all_targets]
    return Dataset.from_dict({"source": list(by_source), "target": first, "references": all_targets})


def tokenize_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, data: Seq2SeqDataConfig) -> Dataset:
    """Turn pairs of texts, from `read_pairs`, into what an encoder-decoder reads, unpadded.

    Targets are tokenized as such (`text_target`).

    Returns:
        A dataset with `input_ids`, `attention_mask`, (`token_type_ids`), `labels` (token ids), `idx`, the row
        number in `pairs`, and `source_length`, `target_length`: tokens before the cut.
    """

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        sources = [data.source_prefix + text for text in rows["source"]]
        encoded, source_lengths = _cut(tokenizer, "text", sources, data.max_source_length)
        targets, target_lengths = _cut(tokenizer, "text_target", rows["target"], data.max_target_length)
        return encoded | {
            "labels": targets["input_ids"],
            "idx": indices,
            "source_length": source_lengths,
            "target_length": target_lengths,
        }

    return pairs.map(encode, batched=True, with_indices=True, remove_columns=pairs.column_names)


def report_lengths(train: Dataset, data: Seq2SeqDataConfig) -> None:
    """Log how long the training texts are, in tokens with the special ones, and how many of them are cut."""
    for kind in ("source", "target"):
        limit, lengths = getattr(data, f"max_{kind}_length"), np.asarray(train[f"{kind}_length"])
        logger.info(
            "%ss: %.0f tokens on average, 95 %% up to %.0f, longest %d; %.1f %% are cut to %d",
            *(kind, lengths.mean(), np.percentile(lengths, 95), lengths.max()),
            *(100 * np.mean(lengths > limit), limit),
        )


class Seq2SeqCollator(Collator):
    """Pads sources on the tokenizer's side, and labels on the right with `IGNORED`; stacks both."""

    columns = ("idx",)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch, all int64: token columns (B, S), `labels` (B, T), `idx` (B,)."""
        # transformers' DataCollatorForSeq2Seq would pad labels to the length or multiple that is for sources.
        labels = [torch.as_tensor(row["labels"], dtype=torch.int64) for row in rows]
        return super().__call__(rows) | {
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        }


def _find(train: Dataset, data: Seq2SeqDataConfig) -> PairColumns:
    source, target = data.source_column, data.target_column
    # A column of this name may hold plain texts, too.
    translations: Iterable[Any] = values(train, TRANSLATION) if TRANSLATION in train.column_names else ()
    languages: list[str] = next((list(row) for row in translations if isinstance(row, Mapping)), [])
    if source is None or target is None:
        if languages:
            return PairColumns(TRANSLATION, TRANSLATION, *_chosen(languages, data))
        unusual = "no pair of columns with usual names for source and target; {}; set data.source_column and "
        source, target = usual_columns(train, USUAL_COLUMNS, unusual + "data.target_column")
        return PairColumns(source, target)
    if {source, target} <= set(languages):
        return PairColumns(TRANSLATION, TRANSLATION, source, target)
    if source == target:
        raise DataError(
            f"data.source_column and data.target_column are both {source}; {existing(train)}; name two"
        )
    named_columns(train, data, "source_column", "target_column")
    return PairColumns(source, target)


def _chosen(languages: list[str], data: Seq2SeqDataConfig) -> tuple[str, str]:
    """Return the language to read and the one to generate, of those that a column `translation` has."""
    there = f"the languages are {', '.join(languages)}"
    chosen = []
    for which in ("source", "target"):
        code = getattr(data, f"{which}_lang")
        # Its own name, or what stands before the `_` of a model's code (en_XX), as in transformers.
        found = [name for name in (code, (code or "").split("_")[0]) if name in languages]
        if not found:
            raise DataError(
                f"data.{which}_lang is {code}; {there}; name one of them (where the model calls it otherwise, name "
                f"the language of the rows as data.{which}_column)"
            )
        chosen.append(found[0])
    if chosen[0] == chosen[1]:
        raise DataError(f"data.source_lang and data.target_lang are both {chosen[0]}; {there}; name two")
    return chosen[0], chosen[1]


def _faults(split: Dataset, columns: PairColumns) -> Iterator[Fault]:
    if columns.source_lang is None:
        yield from text_faults(split, columns.source_column)
        yield from text_faults(split, columns.target_column)
    for row, texts in enumerate(values(split, columns.source_column) if columns.source_lang else ()):
        for language in (columns.source_lang, columns.target_lang):
            text = (texts or {}).get(language)
            if not isinstance(text, str) or is_blank(text):
                yield row, f"has {text!r} as its text in '{language}'; expected words"
    expected = "expected a list of one or more texts (rename the column if it is something else)"
    for row, texts in enumerate(values(split, REFERENCES) if REFERENCES in split.column_names else ()):
        listed = isinstance(texts, list) and texts
        if not listed or not all(isinstance(text, str) and text.strip() for text in texts):
            yield row, f"has {texts!r} in column '{REFERENCES}'; {expected}"


def _cut(
    tokenizer: PreTrainedTokenizerBase, kind: str, texts: list[str], limit: int
) -> tuple[dict[str, list[list[int]]], list[int]]:
    """Tokenize texts as a `text` or a `text_target`; those that are too long a second time, cut.

    So the lengths before the cut are known.
    """
    encoded = dict(encode_texts(tokenizer, **{kind: texts}, verbose=False))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    long = [row for row, length in enumerate(lengths) if length > limit]
    if long:
        too_long = [texts[row] for row in long]
        shorter = encode_texts(tokenizer, **{kind: too_long}, truncation=True, max_length=limit)
        for name, column in encoded.items():
            for row, ids in zip(long, shorter[name], strict=True):
                column[row] = ids
    return encoded, lengths
