"""Checks questions about passages, in SQuAD's schema, and turns them into overlapping windows of tokens.

The settings specific to models that find answers in a text come first.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from swaft.errors import ConfigError, DataError
from swaft.options import Count, Range, WholeNumber
from swaft.training.config.schema import EvalConfig, Fault, ModelConfig, RecipeConfig, RowsConfig
from swaft.training.data.files import map_rows
from swaft.training.data.texts import (
    POSITIONS,
    ROWS_AT_ONCE,
    BadRow,
    encode,
    good_rows,
    number_of,
    text_faults,
    values,
    without_letters,
)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class QuestionAnsweringDataConfig(RowsConfig):
    """Which questions to train and evaluate on, and how their contexts are cut into windows.

    Rows have SQuAD's columns: id, question, context, and answers (text, answer_start).
    """

    max_seq_length: Annotated[int, Range(low=8)] = 384
    """Tokens per window: the question, and as much of the context as fits after it. BERT was fine-tuned with
    384."""
    doc_stride: WholeNumber = 128
    """Tokens of context that a window shares with the next one, so that an answer cut by one is whole in the
    other."""
    version_2_with_negative: bool | None = None
    """Whether a question may have no answer (SQuAD 2.0); null: yes if some question has none. false is an error if
    there is such a question."""

    def conflicts(self) -> Iterator[Fault]:
        """Yield also windows that could not advance."""
        yield from super().conflicts()
        if self.doc_stride >= self.max_seq_length:
            windows = f"windows of data.max_seq_length={self.max_seq_length} tokens"
            reason = f"{windows} cannot share {self.doc_stride} of them and still advance"
            yield "doc_stride", f"{reason}; expected less, a third of the length say"


@dataclass(kw_only=True)
class QuestionAnsweringEvalConfig(EvalConfig):
    """When and how to evaluate."""

    metric: str = "auto"
    """What to measure: squad (exact_match and f1) or squad_v2 (the same, and separately for questions with and
    without an answer); auto: squad_v2 if questions may have no answer."""
    max_answer_length: Count = 30
    """Longest answer in tokens."""
    null_score_diff_threshold: Annotated[float, Range()] = 0.0
    """How far "no answer" has to score above the best answer to be chosen; used if questions may have none."""
    num_samples: WholeNumber = 20
    """Questions of each split whose answers, by last and by averaged weights, are kept in the run folder."""

    tasks: ClassVar = ("question answering",)


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig(RecipeConfig):
    """Everything `recipes/question_answering.py` needs."""

    task: ClassVar[str] = "question answering"

    model: ModelConfig
    data: QuestionAnsweringDataConfig = field(default_factory=QuestionAnsweringDataConfig)
    eval: QuestionAnsweringEvalConfig = field(default_factory=QuestionAnsweringEvalConfig)


COLUMNS = ("id", "question", "context", "answers")
MOST_MISPLACED = 0.01
"""Share of a split's answers that may not be found where `answer_start` says. Such answers are scored
against, but not trained on; if there are more, the starts probably count something else (bytes, say)."""
NO_ANSWER_HERE = -1
"""Offset of a token that no answer can start or end with."""


def check_questions(splits: Mapping[str, Dataset], *, skip_bad_rows: bool = False) -> dict[str, Dataset]:
    """Check every question of every split, and return the usable ones.

    Rows have `id` (whole numbers become texts), `question`, `context` and `answers`: `{"text": [...],
    "answer_start": [...]}`, with starts in characters of the context, and empty lists if there is no answer.

    With `skip_bad_rows`, questions with a missing or empty text, or with malformed answers, are left out.

    Raises:
        DataError: a missing column, a value that is not text or is empty, repeated ids, malformed answers, or more
            than `MOST_MISPLACED` of the answers not at their `answer_start`.
    """
    # Predictions are written as json, whose keys are texts.
    splits = {
        name: split.cast_column("id", Value("string")) if _has_whole_ids(split) else split
        for name, split in splits.items()
    }
    good = good_rows(splits, COLUMNS, _faults, skip=skip_bad_rows)
    for name, split in good.items():
        _refuse_repeated_ids(split, name)
        _judge_places(split, name)
    return good


def may_have_no_answer(splits: Mapping[str, Dataset], version_2_with_negative: bool | None) -> bool:
    """Return whether questions may have no answer: what the setting says, else what the questions show.

    Raises:
        ConfigError: the setting is False, but there are questions without an answer.
    """
    counts = {
        name: sum(not answers["text"] for answers in values(split, "answers"))
        for name, split in splits.items()
    }
    if version_2_with_negative is False and any(counts.values()):
        found = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
        raise ConfigError(
            f"data.version_2_with_negative is false, but questions have no answer ({found}); remove the setting, "
            "or the rows"
        )
    return any(counts.values()) if version_2_with_negative is None else version_2_with_negative


def right_answers(split: Dataset) -> list[tuple[str, list[str]]]:
    """Return the id and the right answers of each question, as the metrics take them."""
    return [(question, list(answers["text"])) for question, answers in values(split, "id", "answers")]


def first_place(context: str, answers: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the first and one past the last character of the first answer found at its `answer_start`."""
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if _stands(text, start, context):
            start += len(text) - len(text.lstrip())
            return start, start + len(text.strip())
    return None


def tokenize_questions(
    split: Dataset, tokenizer: PreTrainedTokenizerBase, data: QuestionAnsweringDataConfig, *, training: bool
) -> Dataset:
    """Turn questions into windows: the question, and as much of the context as fits with it, unpadded.

    The question comes first if the tokenizer pads on the right, else last.

    Args:
        split: rows that `check_questions` checked.
        tokenizer: the model's, a fast one.
        data: the section of the configuration, with the lengths. `doc_stride` is the overlap of windows, as in
            Hugging Face's code, not the step from one to the next, as in the original BERT code.
        training: leave out the questions whose answers are all misplaced; False: keep all questions, and add the
            columns for evaluation.

    Returns:
        A dataset with `input_ids`, `attention_mask`, (`token_type_ids`), `start_positions` and `end_positions`
        (the tokens of the first answer found at its `answer_start`; if there is none, or the window does not hold
        all of it, both are the CLS token, or without one the first token outside the context), and `idx`,
        the number of the window. For evaluation also `row`, the question's row number in `split`,
        `cls_position`, and `offsets`: the first and one past the last character in the context of each token,
        -1 for tokens that no answer can start or end with.
    """
    if training:
        kept = [
            row
            for row, (context, answers) in enumerate(values(split, "context", "answers"))
            if not answers["text"] or first_place(context, answers) is not None
        ]
        if len(kept) < len(split):
            logger.warning(
                "%d training questions left out: no answer is where answer_start says", len(split) - len(kept)
            )
            split = split.select(kept)
    workers, data = data.preprocessing_num_workers, replace(data, preprocessing_num_workers=None)
    in_windows = partial(_encode, tokenizer=tokenizer, data=data, training=training)
    windows = map_rows(split, in_windows, workers)
    return windows.add_column("idx", np.arange(len(windows)))


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not report which characters a token stands for: a slow one."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; set "
            "model.tokenizer_name to a fast tokenizer"
        )


def refuse_unusable_questions(
    splits: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, data: QuestionAnsweringDataConfig
) -> None:
    """Refuse a question that leaves no room for its context, or whose context has no tokens.

    Raises:
        DataError: names the question.
    """
    is_doubtful = without_letters(tokenizer)
    for split in splits.values():
        rows = list(values(split, "id", "question", "context"))
        for first in range(0, len(rows), ROWS_AT_ONCE):
            ids, questions, contexts = zip(*rows[first : first + ROWS_AT_ONCE], strict=True)
            asked = [text.strip() for text in questions]
            encoded = encode(tokenizer, asked, [""] * len(asked), verbose=False)
            lengths = list(map(len, encoded["input_ids"]))
            longest = int(np.argmax(lengths))
            room = data.max_seq_length - lengths[longest]
            if room <= data.doc_stride:
                raise DataError(
                    f"question {ids[longest]} takes {lengths[longest]} tokens, which leaves {max(room, 0)} of "
                    f"data.max_seq_length={data.max_seq_length} for the context; expected more than "
                    f"data.doc_stride={data.doc_stride}. Raise the first, lower the second, or shorten the question"
                )
            for question, context in zip(ids, contexts, strict=True):
                if not is_doubtful(context):
                    continue
                found = tokenizer([context], add_special_tokens=False, return_offsets_mapping=True)
                if (_offsets(found, 0, 0, context) == NO_ANSWER_HERE).all():
                    found = f"the context of question {question} has no tokens (only control characters?)"
                    raise DataError(f"{found}; remove the row")


def _encode(
    rows: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    data: QuestionAnsweringDataConfig,
    training: bool,
) -> dict[str, list[Any]]:
    question_first = tokenizer.padding_side == "right"
    questions, contexts = [text.strip() for text in rows["question"]], rows["context"]
    encoded = encode(
        tokenizer,
        *((questions, contexts) if question_first else (contexts, questions)),
        truncation="only_second" if question_first else "only_first",
        max_length=data.max_seq_length,
        stride=data.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    samples: list[int] = encoded["overflow_to_sample_mapping"]
    offsets = [
        _offsets(encoded, window, int(question_first), contexts[sample])
        for window, sample in enumerate(samples)
    ]
    places = list(map(first_place, contexts, rows["answers"]))
    cls = [
        # Models without a CLS token learn to point at the first token that no answer can start with instead.
        ids.index(tokenizer.cls_token_id)
        if tokenizer.cls_token_id in ids
        else int(np.argmax(window[:, 0] == NO_ANSWER_HERE))
        for ids, window in zip(encoded["input_ids"], offsets, strict=True)
    ]
    spans = [
        _span(places[sample], window, fallback)
        for sample, window, fallback in zip(samples, offsets, cls, strict=True)
    ]
    columns |= {name: [span[side] for span in spans] for side, name in enumerate(POSITIONS)}
    if not training:
        columns |= {"row": [indices[sample] for sample in samples], "cls_position": cls, "offsets": offsets}
    return columns


def _offsets(encoded: Any, window: int, context_id: int, context: str) -> np.ndarray:
    """Return the characters of each token of a window, (L, 2), `NO_ANSWER_HERE` outside the context."""
    # White space can be a token, but is not part of an answer.
    tokens = zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
    listed = [
        (start, end) if sequence == context_id and context[start:end].strip() else (NO_ANSWER_HERE,) * 2
        for (start, end), sequence in tokens
    ]
    return np.array(listed, dtype=np.int32).reshape(-1, 2)


def _span(place: tuple[int, int] | None, offsets: np.ndarray, fallback: int) -> tuple[int, int]:
    """Return the first and last token of the characters `place`, or the fallback twice if some are not here."""
    tokens = np.flatnonzero(offsets[:, 0] != NO_ANSWER_HERE)
    if place is None or not len(tokens):
        return fallback, fallback
    starts, ends = offsets[tokens].T
    if place[0] < starts[0] or place[1] > ends[-1]:
        return fallback, fallback
    first = np.searchsorted(ends, place[0], side="right")
    last = np.searchsorted(starts, place[1], side="left") - 1
    return (int(tokens[first]), int(tokens[last])) if first <= last else (fallback, fallback)


def _stands(text: str, start: int, context: str) -> bool:
    return start >= 0 and context.startswith(text, start)


def _has_whole_ids(split: Dataset) -> bool:
    return "id" in split.column_names and str(getattr(split.features["id"], "dtype", "")).startswith(
        ("int", "uint")
    )


def _refuse_repeated_ids(split: Dataset, name: str) -> None:
    repeated = [question for question, count in Counter(values(split, "id")).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} values of column 'id' are in several rows of {name} ({repeated[0]!r}, ...); "
            "expected one row per id. Remove the repeated rows"
        )


def _judge_places(split: Dataset, name: str) -> None:
    """Refuse a split in which too many answers are not at their `answer_start`, and warn if there are a few."""
    total, odd = 0, []
    for row, (context, answers) in enumerate(values(split, "context", "answers")):
        total += len(answers["text"])
        pairs = zip(answers["text"], answers["answer_start"], strict=True)
        odd += [row for text, start in pairs if not _stands(text, start, context)]
    if len(odd) > MOST_MISPLACED * total:
        raise DataError(
            f"{len(odd)} of {total} answers of {name} do not stand in their context where answer_start says "
            f"(row {number_of(odd[0])}, ...); expected at most {MOST_MISPLACED:.0%}. Count answer_start in "
            "characters from 0"
        )
    if odd:
        logger.warning(
            "%d of %d answers of %s do not stand where answer_start says (row %d, ...)",
            *(len(odd), total, name, number_of(odd[0])),
        )


def _faults(split: Dataset) -> Iterator[BadRow]:
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
