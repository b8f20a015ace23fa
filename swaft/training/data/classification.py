"""Reads rows of text and label: finds columns and classes, and tokenizes rows for a sequence classifier.

The settings specific to models that classify or score texts come first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from unicodedata import normalize

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from swaft.errors import DataError
from swaft.options import Count
from swaft.training.config.schema import EvalConfig, Fault, ModelConfig, RecipeConfig, RowsConfig
from swaft.training.config.values import split_names
from swaft.training.data.files import map_rows
from swaft.training.data.texts import (
    BadRow,
    good_rows,
    named_columns,
    number_of,
    shortened,
    text_faults,
    usual_columns,
    values,
)
from swaft.training.data.texts import encode as encode_texts

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DataConfig(RowsConfig):
    """Which rows to train and evaluate on, and which of their columns."""

    text_column: str | None = None
    """Column with the (first) text; null: found by its usual name (sentence, sentence1, text, ...)."""
    text_pair_column: str | None = None
    """Column with the second text of a pair; null: no pair if `text_column` is set, else found by its usual name,
    if there is one."""
    label_column: str | None = None
    """Column with the answer; null: `label` or `labels`."""
    do_regression: bool | None = None
    """Whether numbers in the label column are scores; null: fractional ones are, whole ones are class ids. false
    also allows -1 as a class."""
    positive_label: str | None = None
    """With two classes, the name of the class whose F1 `eval.metric` measures; null: the second one (for text
    labels, in alphabetical order), and the log says which."""
    eval_languages: str | None = None
    """Comma-separated languages to evaluate on besides that of the training rows (de,fr,sw): each is evaluated at
    the end as a separate split (test_de), and the mean over all languages is reported. With `dataset_name` they are
    configurations; otherwise they are files next to the validation and test files, with the language before
    the extension (test.csv, test.de.csv)."""
    max_seq_length: Count = 128
    """Longest input in tokens; longer texts are cut. 128 fits nearly every GLUE pair."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages to evaluate on besides the language of the training rows."""
        return tuple(split_names(self.eval_languages)) if self.eval_languages else ()

    def conflicts(self) -> Iterator[Fault]:
        """Yield columns and languages that do not go together."""
        yield from super().conflicts()
        if self.text_pair_column is not None and self.text_column is None:
            yield "text_pair_column", "is set without data.text_column; set both"
        languages = [] if self.eval_languages is None else split_names(self.eval_languages)
        if not all(languages) or len(set(languages)) < len(languages):
            advice = "write each language once, separated by commas (de,fr)"
            yield "eval_languages", f"'{self.eval_languages}' holds an empty or a repeated name; {advice}"
        elif self.dataset_config_name in languages:
            reason = "is data.dataset_config_name, whose validation and test rows are evaluated anyway"
            yield "eval_languages", f"{self.dataset_config_name} {reason}; remove it from the languages"


@dataclass(kw_only=True)
class ClassificationEvalConfig(EvalConfig):
    """When and how to evaluate."""

    metric: str = "auto"
    """What to measure: accuracy, f1, f1_macro, accuracy_f1, matthews_correlation, pearson_spearman or mse;
    auto: the usual one for the task."""

    tasks: ClassVar = ("classification", "regression")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(RecipeConfig):
    """Everything `recipes/classification.py` needs."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    eval: ClassificationEvalConfig = field(default_factory=ClassificationEvalConfig)


# Names of text columns in GLUE and similar datasets; pairs first, because some contain the name of a single column.
USUAL_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
)
USUAL_LABEL_COLUMNS = (("label",), ("labels",))
MOST_UNNAMED_CLASSES = 1000
"""Classes that unnamed ids may imply whatever the number of rows; larger ids are taken for other numbers."""
TRUTH = ["False", "True"]
"""Class names of a boolean column."""
LEFT_OUT = "data.max_train_samples and data.validation_fraction may leave no training row with a label"
"""Why a label may have no training row."""
SPELLINGS_OF_NONE = ("na", "n/a", "nan", "none", "null", r"\n")
"""How programs write a missing value as text, in lower case."""
KINDS = {int: "whole numbers", float: "fractional numbers", str: "texts"}
"""Kinds of labels, in words."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the label column of a task holds."""

    num_labels: int
    """Number of classes; 1 for a regression."""
    label_names: list[str] | None
    """Names of the classes in order of their ids, if the data names them."""
    is_regression: bool = False
    """Whether the answer is a score rather than a class."""
    label_ids: Mapping[Any, int] = field(default_factory=dict)
    """Class id by value in the column; empty for a regression."""


@dataclass(frozen=True, kw_only=True)
class Task(Labels):
    """What a classification or regression task reads and predicts."""

    text_columns: tuple[str, ...]
    """One text column, or two for a pair."""
    label_column: str
    """Column with the answer."""
    rows: Mapping[str, Dataset] = field(default_factory=dict, repr=False)
    """Rows by split, without those left out."""

    def __str__(self) -> str:
        """Return the columns, and the classes."""
        names = self.label_names or [str(number) for number in range(self.num_labels)]
        classes = f"{self.num_labels} classes: {shortened([f'{name:.40}' for name in names])}"
        found = "scores" if self.is_regression else classes
        return f"{', '.join(self.text_columns)} -> {self.label_column}, {found}"


def describe_task(splits: Mapping[str, Dataset], data: DataConfig) -> Task:
    """Find the columns and the labels of a task, and check them in every row of every split.

    Bad rows (without a label, or with a text that is missing or blank) are left out if `data.skip_bad_rows` is set.

    Args:
        splits: rows by split, `train` among them.
        data: the section of the configuration; specifies columns that do not have the usual names.

    Raises:
        DataError: a column that does not exist, a value that is not text, or a label that does not fit.
    """
    train = splits["train"]
    text_columns = named_columns(train, data, "text_column", "text_pair_column") or usual_columns(
        train, USUAL_TEXT_COLUMNS, "no column with a usual name for text; {}; set data.text_column"
    )
    [label_column] = named_columns(train, data, "label_column") or usual_columns(
        train, USUAL_LABEL_COLUMNS, "no column named label or labels; {}; set data.label_column"
    )

    def faults(split: Dataset) -> Iterator[BadRow]:
        for column in text_columns:  # most tokenizers return tokens for a blank text, so it can be classified
            yield from text_faults(split, column, blank=data.skip_bad_rows)
        yield from _label_faults(split, label_column)

    rows = good_rows(splits, (*text_columns, label_column), faults, skip=data.skip_bad_rows)
    labels = read_labels(rows, label_column, do_regression=data.do_regression)
    return Task(text_columns=text_columns, label_column=label_column, rows=rows, **vars(labels))


def tokenize(
    split: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    *,
    workers: int | None = None,
) -> Dataset:
    """Tokenize rows for the model, without padding.

    Args:
        split: rows of the task.
        task: what `describe_task` found.
        tokenizer: the model's tokenizer.
        max_seq_length: tokens a row is cut to, special tokens included; in a pair, the longer text is cut.
        workers: processes to use; None: this one.

    Returns:
        A dataset with `input_ids`, `attention_mask`, (`token_type_ids`), `labels` (class ids, or floats for
        a regression) and `idx`, the row number in `split`.
    """
    task = replace(task, rows={})  # `map` pickles whatever the function holds

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts = [rows[column] for column in task.text_columns]
        encoded = dict(encode_texts(tokenizer, *texts, truncation=True, max_length=max_seq_length))
        label_of = float if task.is_regression else task.label_ids.__getitem__
        return encoded | {"labels": list(map(label_of, rows[task.label_column])), "idx": indices}

    return map_rows(split, encode, workers)


def report_lengths(train: Dataset, max_seq_length: int) -> None:
    """Log how long tokenized training rows are, and how many have `max_seq_length` tokens (longer ones are cut)."""
    lengths = list(map(len, values(train, "input_ids")))
    logger.info(
        "rows: %.0f tokens on average; %.1f %% have data.max_seq_length=%d tokens (longer ones are cut)",
        *(sum(lengths) / len(lengths), 100 * lengths.count(max_seq_length) / len(lengths), max_seq_length),
    )


def read_labels(splits: Mapping[str, Dataset], column: str, *, do_regression: bool | None = None) -> Labels:
    """Read the labels of a task, and check every row of every split.

    Fractional numbers are scores; fractional numbers written as texts need `do_regression`. Text is a class, whose
    id is its position in the sorted texts of the training rows. A whole number is a class id; the number of classes
    comes from the column's type, else it is the largest id of the training rows plus one. Whole numbers that do not
    start with 0 (1 to 6) are class names, as texts are; if 0 is among them, negative ones are class names only if
    `do_regression` is False, and missing answers otherwise. Whole numbers stored as fractional ones (1.0) may be
    either, and need `do_regression`. Names made of numbers, and ids that no training row has, are logged.

    Args:
        splits: rows by split, `train` among them, without those that have no label.
        column: the label column, present in every split.
        do_regression: whether numbers are scores (True) or class ids (False); None: as above.

    Raises:
        DataError: labels that may be either, or a row with one that no training row has; gives split and row.
    """
    labels = {name: split[column][:] for name, split in splits.items()}
    kinds = {name: _kind(rows, name, column) for name, rows in labels.items()}
    kind = kinds["train"]
    for name, other in kinds.items():
        # Numbers may mix: a small split of scores may have no fractions, and class ids may be stored as fractions.
        if (other is str) != (kind is str):
            raise DataError(
                f"column '{column}' holds {KINDS[kind]} in train but {KINDS[other]} in {name}; "
                "expected the same kind in every split"
            )
    if do_regression is None:
        _refuse_doubtful(labels["train"], kind, column)
    if do_regression or (do_regression is None and kind is float):
        if kind is str:
            expected = (
                "is not a score; expected a number with a decimal point, or remove data.do_regression=true"
            )
            _require_each(labels, column, _is_score, f", which {expected}")
        return Labels(num_labels=1, label_names=None, is_regression=True)
    if kind is str:
        found = _read_names(labels, column)
    else:
        found = _read_ids(splits, labels, column, may_be_negative=do_regression is False)
    if found.num_labels < 2:
        raise DataError(
            f"every training row has the same {column}: there is nothing to classify. Name another column "
            "with data.label_column, or raise data.max_train_samples"
        )
    return found


def _label_faults(split: Dataset, column: str) -> Iterator[BadRow]:
    """Yield the rows without a label: null, blank, not a finite number, or -1 if it is not a class.

    -1 is not a class in a column with named classes, or if every row of a split has it (its labels are withheld).
    """
    labels = list(values(split, column))
    withheld = isinstance(split.features[column], ClassLabel) or all(each == -1 for each in labels)
    for row, value in enumerate(labels):
        is_not_finite = isinstance(value, float) and not math.isfinite(value)
        if value is None or is_not_finite or (isinstance(value, str) and not value.strip()):
            yield row, f"has no {column} ({value!r})"
        elif withheld and value == -1:
            yield row, f"has {column}=-1, which marks a row without its answer"


def _kind(rows: list[Any], split: str, column: str) -> type:
    for kind, members in ((int, (int, bool)), (float, (int, float)), (str, (str,))):
        if all(isinstance(value, members) for value in rows):
            return kind
    first = type(rows[0]).__name__
    other = next(((row, value) for row, value in enumerate(rows) if type(value) is not type(rows[0])), None)
    if other is not None:
        raise DataError(
            f"column '{column}' of {split} holds the {first} {rows[0]!r:.80} in row 1, but the "
            f"{type(other[1]).__name__} {other[1]!r:.80} in row {number_of(other[0])}; write all as texts, "
            "or all as numbers"
        )
    raise DataError(
        f"column '{column}' of {split} holds {first} values; expected class ids, texts or scores. "
        "Name another column with data.label_column"
    )


def _are_whole(rows: list[Any]) -> bool:
    return all(value % 1 == 0 for value in rows)


def _score(text: str) -> float | None:
    """Parse a text as a number; None: it is not one."""
    try:
        return float(text)
    except ValueError:
        return None


def _is_score(text: str) -> bool:
    score = _score(text)
    return score is not None and math.isfinite(score)


def _refuse_doubtful(labels: list[Any], kind: type, column: str) -> None:
    """Refuse labels that may be classes or scores: 1.0 and 2.0; texts that are all numbers (1.5, "1,5", nan)."""
    if kind is float and _are_whole(labels):
        raise DataError(
            f"column '{column}' holds whole numbers stored as fractional ones ({labels[0]}, ...): class "
            "ids or scores? Set data.do_regression=false for classes, data.do_regression=true for scores"
        )
    scores = {text: _score(text.replace(",", ".", 1)) for text in labels} if kind is str else {}
    fraction = next((text for text, score in scores.items() if score and score % 1), None)
    if fraction is not None and None not in scores.values():
        raise DataError(
            f"column '{column}' holds numbers written as texts ({fraction!r}, ...): classes or scores? Set "
            "data.do_regression=false for classes, data.do_regression=true for scores (with a decimal point)"
        )


def _require_each(
    labels: Mapping[str, list[Any]], column: str, is_allowed: Callable[[Any], bool], fault: str
) -> None:
    """Raise for the first label that is not allowed, and say why."""
    for split, rows in labels.items():
        for row, value in enumerate(rows):
            if not is_allowed(value):
                raise DataError(f"row {number_of(row)} of {split} has {column}={value!r}{fault}")


def _read_names(labels: Mapping[str, list[Any]], column: str) -> Labels:
    known = sorted(set(labels["train"]))
    names = [label if isinstance(label, str) else str(int(label)) for label in known]
    ids = {label: number for number, label in enumerate(known)}
    if missing := [name for name in names if name.strip().casefold() in SPELLINGS_OF_NONE]:
        logger.warning(
            "%s: %s is a class; if it marks rows without a label, leave their cells empty, and set "
            "data.skip_bad_rows=true",
            *(column, shortened([repr(name) for name in missing])),
        )
    expected = f"expected one of {shortened(names)} ({LEFT_OUT})"
    _require_each(labels, column, ids.__contains__, f", which no training row has; {expected}")
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(normalize("NFKC", name).strip().casefold(), name)
        if other != name:
            logger.warning(
                "%s: %r and %r are two classes; write them alike if they are one", column, other, name
            )
    return Labels(num_labels=len(names), label_names=names, label_ids=ids)


def _read_ids(
    splits: Mapping[str, Dataset], labels: Mapping[str, list[Any]], column: str, *, may_be_negative: bool
) -> Labels:
    for name, rows in labels.items():
        if not _are_whole(rows):
            raise DataError(
                f"column '{column}' of {name} holds fractional numbers, which are not class ids; "
                "set data.do_regression=true"
            )
    names, found = _class_names(splits, column), set(labels["train"])
    are_names = 0 not in found or (may_be_negative and min(found) < 0)
    if (names is None and are_names) or (names is TRUTH and len(found) == 1):
        read = _read_names(labels, column)
        logger.info(
            "%s: whole numbers %s 0 are names of %d classes: %s",
            *(column, "below" if 0 in found else "without", read.num_labels),
            shortened(read.label_names or []),
        )
        return read
    ids = {name: [int(number) for number in rows] for name, rows in labels.items()}
    num_labels = len(names) if names is not None else max(ids["train"]) + 1
    if names is None and num_labels > max(MOST_UNNAMED_CLASSES, len(ids["train"])):
        row = number_of(ids["train"].index(num_labels - 1))
        raise DataError(
            f"row {row} of train has {column}={num_labels - 1}, which would make {num_labels} classes from "
            f"{len(ids['train'])} rows; expected class ids counted from 0. Name another column with "
            "data.label_column"
        )
    _require_each(
        *(ids, column, range(num_labels).__contains__),
        f"; expected 0 to {num_labels - 1}, the labels of the {'column type' if names else 'training rows'} (-1 "
        "usually marks a row without its answer: leave such rows out; if it is a class, set "
        f"data.do_regression=false; {LEFT_OUT})",
    )
    unseen = [str(number) for number in range(num_labels) if number not in found]
    if unseen and names is None:
        logger.info(
            "%s: class ids 0 to %d; no training row has %s", column, num_labels - 1, shortened(unseen)
        )
    return Labels(num_labels=num_labels, label_names=names, label_ids={i: i for i in range(num_labels)})


def _class_names(splits: Mapping[str, Dataset], column: str) -> list[str] | None:
    features = {name: split.features[column] for name, split in splits.items()}
    named = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for name, names in named.items():
        if names != named.get("train"):
            raise DataError(
                f"column '{column}' names its classes {shortened(names)} in {name} but "
                f"{shortened(named.get('train') or ['(no names)'])} in train, so an id means different things"
            )
    if not named and all(set(map(type, split[column][:])) == {bool} for split in splits.values()):
        return TRUTH
    return named.get("train")
