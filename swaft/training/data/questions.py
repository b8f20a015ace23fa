"""Checks questions about passages, in SQuAD's schema, and says where their answers stand."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Value

from swaft.errors import ConfigError, DataError
from swaft.training.data.checks import Fault, existing, good_rows, refuse_repeated_ids, text_faults, values

logger = logging.getLogger(__name__)

COLUMNS = ("id", "question", "context", "answers")


@dataclass(frozen=True)
class QuestionReport:
    """What is known of the questions before they are tokenized."""

    unanswerable: dict[str, int]
    """By split: questions that have no answer (SQuAD 2.0)."""
    misplaced: dict[str, int]
    """By split: answers that do not stand where `answer_start` says."""
    rows: Mapping[str, Dataset] = field(default_factory=dict, repr=False)
    """Questions by split, without those that were left out."""

    @property
    def has_unanswerable(self) -> bool:
        """Whether some question of some split has no answer."""
        return any(self.unanswerable.values())


def check_questions(
    splits: Mapping[str, Dataset], *, most_misplaced: float = 0.01, skip_bad_rows: bool = False
) -> QuestionReport:
    """Check every question of every split.

    Rows have `id` (whole numbers become texts), `question`, `context` and `answers`: `{"text": [...],
    "answer_start": [...]}`, starts in characters of the context, empty lists where there is no answer.

    Args:
        splits: rows by split.
        most_misplaced: share of a split's answers that may stand elsewhere than `answer_start` says. Such
            answers are scored against, but not trained on; more of them mean that the starts count
            something else (bytes, say).
        skip_bad_rows: leave out questions with a text that is none or empty, or answers of another form.

    Raises:
        DataError: a missing column, a value that is no text or an empty one, repeated ids, answers of
            another form, or too many that are misplaced.
    """
    misplaced, unanswerable = {}, {}
    for name, split in splits.items():
        for column in COLUMNS:
            if column not in split.column_names:
                raise DataError(
                    f"the {name} split has no column '{column}'; {existing(split)}; expected SQuAD's: "
                    f"{', '.join(COLUMNS)}"
                )
    # Predictions are files of json, whose keys are texts.
    splits = {
        name: split.cast_column("id", Value("string")) if _has_whole_ids(split) else split
        for name, split in splits.items()
    }
    good = good_rows(splits, _faults, skip=skip_bad_rows)
    for name, split in good.items():
        refuse_repeated_ids(split, name)
        total, odd = 0, []
        unanswerable[name] = 0
        for row, (context, answers) in enumerate(
            zip(values(split, "context"), values(split, "answers"), strict=True)
        ):
            texts, starts = answers["text"], answers["answer_start"]
            unanswerable[name] += not texts
            total += len(texts)
            odd += [
                row for text, start in zip(texts, starts, strict=True) if not _stands(text, start, context)
            ]
        if len(odd) > most_misplaced * total:
            raise DataError(
                f"{len(odd)} of {total} answers of {name} do not stand in their context where answer_start says "
                f"(row {odd[0]}, ...); expected at most {most_misplaced:.0%}. Count answer_start in "
                "characters from 0"
            )
        if odd:
            logger.warning(
                "%d of %d answers of %s do not stand where answer_start says (row %d, ...)",
                len(odd),
                total,
                name,
                odd[0],
            )
        misplaced[name] = len(odd)
    return QuestionReport(unanswerable, misplaced, good)


def may_have_no_answer(report: QuestionReport, version_2_with_negative: bool | None) -> bool:
    """Return whether "none" is an answer: what the setting says, else what the questions show.

    Args:
        report: from `check_questions`.
        version_2_with_negative: the setting of this name; None: it says nothing.

    Raises:
        ConfigError: it says no, and there are questions without an answer.
    """
    if version_2_with_negative is False and report.has_unanswerable:
        counts = ", ".join(f"{count} of {name}" for name, count in report.unanswerable.items() if count)
        raise ConfigError(
            f"data.version_2_with_negative is false, but questions have no answer ({counts}); remove the setting, "
            "or the rows"
        )
    return report.has_unanswerable if version_2_with_negative is None else version_2_with_negative


def right_answers(split: Dataset) -> list[tuple[str, list[str]]]:
    """Return id and right answers of each question, as the metrics take them."""
    return [
        (question, list(answers["text"]))
        for question, answers in zip(values(split, "id"), values(split, "answers"), strict=True)
    ]


def first_place(context: str, answers: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the first and one past the last character of the first answer that stands where it says."""
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if _stands(text, start, context):
            start += len(text) - len(text.lstrip())
            return start, start + len(text.strip())
    return None


def _stands(text: str, start: int, context: str) -> bool:
    return start >= 0 and context.startswith(text, start)


def _has_whole_ids(split: Dataset) -> bool:
    return str(getattr(split.features["id"], "dtype", "")).startswith(("int", "uint"))


def _faults(split: Dataset) -> Iterator[Fault]:
    for column in ("id", "question", "context"):
        yield from text_faults(split, column)
    for row, answers in enumerate(values(split, "answers")):
        fault = _answers_fault(answers)
        if fault is not None:
            yield row, fault


def _answers_fault(answers: Any) -> str | None:
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    starts = answers.get("answer_start") if isinstance(answers, Mapping) else None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return (
            f"has {answers!r} in column 'answers'; expected {{'text': [...], 'answer_start': [...]}}, lists of the "
            "same length"
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            return (
                f"has the answer {text!r} at {start!r}; expected words, and the number of their first character in "
                "the context (both lists empty where there is no answer)"
            )
    return None
