"""Finds source and target texts in rows, and all references of a source, and tokenizes them.

The settings specific to models that read one text and write another come first.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from swaft.errors import DataError
from swaft.options import Count, Option, Range, ShareBelowOne, WholeNumber
from swaft.training.config.schema import (
    AnyModelConfig,
    EvalConfig,
    Fault,
    RecipeConfig,
    RowsConfig,
    TrainConfig,
)
from swaft.training.config.values import literal_breaks
from swaft.training.data.files import map_rows
from swaft.training.data.texts import (
    BadRow,
    ColumnFault,
    existing,
    good_rows,
    is_blank,
    named_columns,
    special_tokens,
    text_faults,
    usual_columns,
    values,
)
from swaft.training.data.texts import encode as encode_texts

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Seq2SeqModelConfig(AnyModelConfig):
    """Which text model to fine-tune, or the configuration of a new one."""

    model_name_or_path: str | None = None
    """Hub id or folder of the pretrained model: an encoder-decoder (T5, BART, mBART, Pegasus, Marian, NLLB), or in
    recipes/causal_lm.py a decoder (Llama, Qwen, Gemma, GPT-2); null with `config`."""
    config: dict[str, Any] | None = None
    """A new model to train from random weights instead of a pretrained one: entries of its transformers
    configuration, including `model_type` (t5, bart, ...); the rest keep the defaults of that type."""
    vocab_size: Annotated[int, Range(low=300)] | None = None
    """Vocabulary size of the tokenizer that is trained on the training rows for a new model without
    `tokenizer_name`; null: 4096."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; null: the model's own, or a new one for a new model."""

    @property
    def described(self) -> dict[str, Any] | None:
        """Entries of a new model's transformers configuration; None: the model is pretrained."""
        return self.config

    @property
    def brings_tokenizer(self) -> bool:
        """Whether there is a tokenizer; otherwise one is trained for the new model."""
        return self.config is None or self.tokenizer_name is not None

    @property
    def most_tokens(self) -> int:
        """Largest vocabulary size of a new tokenizer."""
        return self.vocab_size or 4096

    def conflicts(self) -> Iterator[Fault]:
        """Yield also no model or two models, and settings that a new one cannot have."""
        yield from super().conflicts()
        new, named = self.config, self.model_name_or_path
        if new is None and named is None:
            advice = "set it to a pretrained model, or model.config for a new model"
            yield "model_name_or_path", f"no model named; {advice}"
        if self.vocab_size is not None and self.brings_tokenizer:
            message = "is the size of a new tokenizer, but none is trained if model.model_name_or_path or"
            yield "vocab_size", f"{message} model.tokenizer_name provides one; remove it"
        if new is None:
            return
        if self.use_peft:
            message = "adapters change a pretrained model, and model.config describes a new one"
            yield "use_peft", f"{message}; set model.use_peft=false"
        if named is not None:
            message = f"describes a new model, but model.model_name_or_path={named} names a pretrained one"
            yield "config", f"{message}; keep one (set the other to null)"
        if "model_type" not in new:
            yield "config", "has no model_type; expected one such as t5 or llama"
        if Option.of(Count).fault(size := new.get("vocab_size", 1)):
            expected = "expected 1 or more, or leave it out to take the tokenizer's"
            yield "config", f"vocab_size is {size!r}; {expected}"


@dataclass(kw_only=True)
class Seq2SeqDataConfig(RowsConfig):
    """Which rows to train and evaluate on, and which of their columns."""

    source_column: str | None = None
    """Column with the text to read; null: both columns are found by their usual names (document and summary,
    article and highlights, ...). A language in the column `translation` works too."""
    target_column: str | None = None
    """Column with the text to write; set it with `source_column` or not at all."""
    source_lang: str | None = None
    """Language to read: a key of the column `translation`, or for a multilingual model its code (en_XX, eng_Latn).
    A code matches the key before its `_`; if the key differs, set `source_column` as well."""
    target_lang: str | None = None
    """Language to write. BLEU splits Chinese, Japanese and Korean into words by it, whatever the model."""
    source_prefix: str = ""
    """Text put before every source. T5 gets its task this way: "summarize: ", "translate English to French: "."""
    max_source_length: Annotated[int, Range(low=2)] = 512
    """Longest source in tokens; longer texts are cut. T5 was pretrained with 512."""
    max_target_length: Annotated[int, Range(low=2)] = 128
    """Longest target in tokens; longer texts are cut. 128 fits nearly every news summary."""

    def conflicts(self) -> Iterator[Fault]:
        """Yield also a column or a language without its counterpart, and a line break that is none."""
        yield from super().conflicts()
        yield from literal_breaks(self, "source_prefix")
        for pair in (("source_column", "target_column"), ("source_lang", "target_lang")):
            missing = [name for name in pair if getattr(self, name) is None]
            if len(missing) == 1:
                yield missing[0], "is not set, but its counterpart is; set both or none"


@dataclass(kw_only=True)
class Seq2SeqTrainConfig(TrainConfig):
    """How to optimise, and where the results go."""

    label_smoothing_factor: ShareBelowOne = 0.0
    """Share of each target token spread over the whole vocabulary, in training only; the evaluation loss is
    never smoothed. 0: off. 0.1 is usual for training translation from scratch."""


@dataclass(kw_only=True)
class Seq2SeqEvalConfig(EvalConfig):
    """When and how to evaluate."""

    metric: str = "auto"
    """What to measure on generated texts: rouge, rougeL_coco, bleu, chrf, bleu_chrf or bleu_rouge; auto:
    bleu_chrf for translations and rouge for the rest."""
    predict_with_generate: bool = True
    """Generate a text for every row and score it. false: measure only the loss, which is much faster."""
    num_beams: Count | None = None
    """Width of the beam search, 1: greedy decoding; null: as in the model's generation settings (1 for most)."""
    max_new_tokens: Count | None = None
    """Longest text to generate, in tokens; null: `data.max_target_length`."""
    num_samples: WholeNumber = 20
    """Rows of each split whose texts, generated by last and by averaged weights, are kept in the run folder."""

    tasks: ClassVar = ("generation",)

    def conflicts(self) -> Iterator[Fault]:
        """Yield also settings of generated texts if none are generated."""
        yield from super().conflicts()
        for name, default in {"metric": "auto", "num_beams": None, "max_new_tokens": None}.items():
            if not self.predict_with_generate and (value := getattr(self, name)) != default:
                reason = "is about generated texts, but eval.predict_with_generate=false generates none"
                yield name, f"{value} {reason}; remove one of the two"


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(RecipeConfig):
    """Everything `recipes/seq2seq.py` needs."""

    task: ClassVar[str] = "sequence to sequence"

    model: Seq2SeqModelConfig = field(default_factory=Seq2SeqModelConfig)
    data: Seq2SeqDataConfig = field(default_factory=Seq2SeqDataConfig)
    train: Seq2SeqTrainConfig
    eval: Seq2SeqEvalConfig = field(default_factory=Seq2SeqEvalConfig)


# Column names in datasets of summarisation, dialogue and data-to-text.
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
SPLIT_BY_A_TOKENIZER = {
    **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja"),
    **dict.fromkeys(("ko", "kor"), "ko"),
}
"""Languages that BLEU splits with a tokenizer of their own: the first part of a code -> sacrebleu's code."""
REFERENCES = "references"
"""Column that lists all reference texts of a row."""


@dataclass(frozen=True)
class PairColumns:
    """Where the rows of a generation task have their texts."""

    source_column: str
    """Column with the text to read."""
    target_column: str
    """Column with the text to generate; the source's own for translations."""
    source_lang: str | None = None
    """Language to read, a key of the translation column; None: not a translation."""
    target_lang: str | None = None
    """Language to generate."""
    rows: Mapping[str, Dataset] = field(default_factory=dict, repr=False, compare=False)
    """Rows by split, without those left out."""

    def __str__(self) -> str:
        """Return the columns, or the languages."""
        if self.source_lang is not None:
            return f"{self.source_lang} -> {self.target_lang}"
        return f"{self.source_column} -> {self.target_column}"


def find_pairs(splits: Mapping[str, Dataset], data: Seq2SeqDataConfig) -> PairColumns:
    """Find the columns of a generation task, and check them in every row of every split.

    Args:
        splits: rows by split, `train` among them.
        data: the section of the configuration; specifies columns that do not have the usual names, or languages of
            the column `translation`. A model's code for a language (en_XX) works too.

    Raises:
        DataError: a column or language that does not exist or has to be specified, a missing or empty text, or
            an empty list of references.
    """
    columns = _find(splits["train"], data)
    names = (columns.source_column, columns.target_column)
    rows = good_rows(splits, names, partial(_faults, columns=columns), skip=data.skip_bad_rows)
    if data.validation_fraction is not None and "validation" in rows:
        _report_shared_sources(rows, columns)
    return replace(columns, rows=rows)


def bleu_language(code: str | None) -> str:
    """Return sacrebleu's code of a language that BLEU splits with a tokenizer of its own; "" for all others."""
    return SPLIT_BY_A_TOKENIZER.get(re.split("[_-]", code or "")[0].lower(), "")


def read_pairs(split: Dataset, name: str, columns: PairColumns) -> Dataset:
    """Return the rows as `source`, `target` and `references` (the texts to score against).

    References are the row's list (column `references`) if there is one, else only the row's target. In
    the second case, rows outside train that share a source become one row with all their targets as
    references, in order of first appearance: scoring a text against each of them alone would penalise it
    for what the others say. The target, from which labels are made, is then the first of them. Translations
    keep their rows, as in published scores.
    """
    has_lists = REFERENCES in split.column_names
    columns = replace(columns, rows={})  # `map` pickles whatever the function holds

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
    """Tokenize pairs of texts, from `read_pairs`, for an encoder-decoder, without padding.

    Targets are tokenized as targets (`text_target`). If the tokenizer ends no text (Gemma's), they get its
    end-of-text token and no other: a model that has seen no end writes none. The token with which such a tokenizer
    starts texts is the one that T5Gemma's decoder starts with anyway, and it cannot tell one from two of them.

    Returns:
        A dataset with `input_ids`, `attention_mask`, (`token_type_ids`), `labels` (token ids), `idx`, the row
        number in `pairs`, and `source_length`, `target_length`: tokens before truncation.
    """
    workers, data = data.preprocessing_num_workers, replace(data, preprocessing_num_workers=None)
    example, eos = tokenizer(text_target="a")["input_ids"], tokenizer.eos_token_id
    end = [] if eos in (None, *example) or example[-1] in special_tokens(tokenizer).values() else [eos]

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        sources = [data.source_prefix + text for text in rows["source"]]
        encoded, source_lengths = _cut(tokenizer, "text", sources, data.max_source_length)
        room = data.max_target_length - len(end)
        targets, target_lengths = _cut(
            tokenizer, "text_target", rows["target"], room, add_special_tokens=not end
        )
        return encoded | {
            "labels": [ids if ids[-1:] == end else [*ids, *end] for ids in targets["input_ids"]],
            "idx": indices,
            "source_length": source_lengths,
            "target_length": [length + len(end) for length in target_lengths],
        }

    return map_rows(pairs, encode, workers)


def report_lengths(train: Dataset, data: Seq2SeqDataConfig) -> None:
    """Log how long the training texts are, in tokens including special ones, and how many of them are cut."""
    for kind in ("source", "target"):
        log_lengths(f"{kind}s", train[f"{kind}_length"][:], getattr(data, f"max_{kind}_length"))


def log_lengths(what: str, counted: Sequence[int], limit: int) -> None:
    """Log how long some texts are, in tokens before they are cut, and how many of them are cut to a limit."""
    lengths = np.asarray(counted)
    logger.info(
        "%s: %.0f tokens on average, 95 %% up to %.0f, longest %d; %.1f %% are cut to %d",
        *(what, lengths.mean(), np.percentile(lengths, 95), lengths.max()),
        *(100 * np.mean(lengths > limit), limit),
    )


def _find(train: Dataset, data: Seq2SeqDataConfig) -> PairColumns:
    source, target = data.source_column, data.target_column
    # A column of this name may also hold plain texts.
    translations: Iterable[Any] = values(train, TRANSLATION) if TRANSLATION in train.column_names else ()
    languages: list[str] = next((list(row) for row in translations if isinstance(row, Mapping)), [])
    if source is None or target is None:
        if languages:
            return PairColumns(TRANSLATION, TRANSLATION, *_chosen(languages, data))
        unusual = (
            "no pair of columns has usual names for source and target; {}; set data.source_column and "
            "data.target_column"
        )
        if TRANSLATION in train.column_names:
            unusual += (
                f" (column '{TRANSLATION}' holds no translations: expected an object with a text for each "
                "language; json lines and parquet keep objects, csv does not)"
            )
        source, target = usual_columns(train, USUAL_COLUMNS, unusual)
        return PairColumns(source, target)
    if {source, target} <= set(languages):
        return PairColumns(TRANSLATION, TRANSLATION, source, target)
    if source == target:
        raise DataError(
            f"data.source_column and data.target_column are both {source}; {existing(train)}; set two"
        )
    named_columns(train, data, "source_column", "target_column")
    return PairColumns(source, target)


def _chosen(languages: list[str], data: Seq2SeqDataConfig) -> tuple[str, str]:
    """Return the language to read and the one to generate, from those in the column `translation`."""
    there = f"the languages are {', '.join(languages)}"
    chosen = []
    for which in ("source", "target"):
        code = getattr(data, f"{which}_lang")
        # The setting itself, or the part before the `_` of a model's code (en_XX), as in transformers.
        found = [name for name in (code, (code or "").split("_")[0]) if name in languages]
        if not found:
            raise DataError(
                f"data.{which}_lang is {code}; {there}; name one of them (if the model has another code for it, "
                f"set data.{which}_column to the language of the rows)"
            )
        chosen.append(found[0])
    if chosen[0] == chosen[1]:
        raise DataError(f"data.source_lang and data.target_lang are both {chosen[0]}; {there}; set two")
    return chosen[0], chosen[1]


def _faults(split: Dataset, columns: PairColumns) -> Iterator[BadRow]:
    if columns.source_lang is None:
        yield from text_faults(split, columns.source_column)
        yield from text_faults(split, columns.target_column)
    else:
        yield from _translation_faults(split, columns)
    if REFERENCES in split.column_names:
        yield from _reference_faults(split)


def _translation_faults(split: Dataset, columns: PairColumns) -> Iterator[BadRow]:
    for row, texts in enumerate(values(split, columns.source_column)):
        if isinstance(texts, str):
            found = f"has the text {texts!r:.80} as its translation"
            yield row, ColumnFault(f"{found}; expected a text for each language")
            continue
        for language in (columns.source_lang, columns.target_lang):
            text = (texts or {}).get(language)
            if not isinstance(text, str) or is_blank(text):
                yield row, f"has {text!r} as its text in '{language}'; expected words"


def _reference_faults(split: Dataset) -> Iterator[BadRow]:
    expected = "expected a list of one or more texts (rename the column if it is something else)"
    for row, texts in enumerate(values(split, REFERENCES)):
        listed = isinstance(texts, list) and texts
        if not listed or not all(isinstance(text, str) and text.strip() for text in texts):
            yield row, f"has {texts!r} in column '{REFERENCES}'; {expected}"


def _report_shared_sources(rows: Mapping[str, Dataset], columns: PairColumns) -> None:
    """Warn if validation rows that were drawn from train share their source with training rows."""

    def sources(split: Dataset) -> Iterator[str]:
        found = values(split, columns.source_column)
        return (texts[columns.source_lang] for texts in found) if columns.source_lang else found

    trained = set(map(hash, sources(rows["train"])))
    if shared := sum(hash(source) in trained for source in sources(rows["validation"])):
        logger.warning(
            "%d of %d validation rows share their source with training rows, because data.validation_fraction "
            "draws rows, not sources; to score unseen sources, set data.validation_file",
            *(shared, len(rows["validation"])),
        )


def _cut(
    tokenizer: PreTrainedTokenizerBase, kind: str, texts: list[str], limit: int, **options: Any
) -> tuple[dict[str, list[list[int]]], list[int]]:
    """Tokenize texts as a `text` or a `text_target`; those that are too long a second time, truncated.

    This gives the lengths before truncation.
    """
    encoded = dict(encode_texts(tokenizer, **{kind: texts}, **options, verbose=False))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    long = [row for row, length in enumerate(lengths) if length > limit]
    if long:
        too_long = [texts[row] for row in long]
        shorter = encode_texts(tokenizer, **{kind: too_long}, **options, truncation=True, max_length=limit)
        for name, column in encoded.items():
            for row, ids in zip(long, shorter[name], strict=True):
                column[row] = ids
    return encoded, lengths
