"""Turns questions about passages into overlapping windows of tokens, and those into batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from swaft.errors import DataError
from swaft.training.data.checks import ROWS_AT_ONCE, padding, require_length, values
from swaft.training.data.questions import first_place
from swaft.training.data.texts import encode

logger = logging.getLogger(__name__)

NO_ANSWER_HERE = -1
"""Offset of a token that no answer can begin or end with."""
POSITIONS = ("start_positions", "end_positions")


def tokenize_questions(
    split: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    doc_stride: int,
    training: bool,
) -> Dataset:
    """Turn questions into windows: the question, and as much of the context as fits beside it, unpadded.

    The question comes first where the tokenizer pads on the right, last otherwise.

    Args:
        split: rows that `check_questions` checked.
        tokenizer: the model's, a fast one.
        max_seq_length: tokens of a window, question and special tokens included.
        doc_stride: tokens that a window of the context shares with the next one; Hugging Face's sense of the
            word, not that of the first BERT code, where it was the step from one to the next.
        training: leave out the questions whose answers are all misplaced; False: keep all, and what
            `find_answers` needs.

    Returns:
        A dataset with `input_ids`, `attention_mask`, (`token_type_ids`), `start_positions` and `end_positions`
        (the tokens of the first answer that stands where it says; both the CLS token, or without one the first
        that is no part of the context, where the window does not hold all of it, or there is none), and `idx`,
        the number of the window. For evaluation also `row`, the question's row number in `split`,
        `cls_position`, and `offsets`: the first and one past the last character in the context of each token,
        -1 for tokens that no answer can begin or end with.

    Raises:
        DataError: a slow tokenizer, windows longer than the model reads, a question that leaves no room for
            the context, or a context without tokens.
    """
    require_offsets(tokenizer)
    require_length("data.max_seq_length", max_seq_length, tokenizer.model_max_length)
    if training:
        kept = [
            row
            for row, (context, answers) in enumerate(
                zip(values(split, "context"), values(split, "answers"), strict=True)
            )
            if not answers["text"] or first_place(context, answers) is not None
        ]
        if len(kept) < len(split):
            logger.warning("%d training questions left out: no answer where it says", len(split) - len(kept))
            split = split.select(kept)
    encode = partial(
        _encode, tokenizer=tokenizer, max_seq_length=max_seq_length, doc_stride=doc_stride, training=training
    )
    windows = split.map(encode, batched=True, with_indices=True, remove_columns=split.column_names)
    return windows.add_column("idx", np.arange(len(windows)))


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not know which characters a token stands for.

    Raises:
        DataError: as said.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; set "
            "model.tokenizer_name to a fast tokenizer"
        )


def refuse_long_questions(
    splits: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, *, max_seq_length: int, doc_stride: int
) -> None:
    """Refuse a question that leaves no room for its context, before any context is tokenized.

    Args:
        splits: rows that `check_questions` checked.
        tokenizer: the model's.
        max_seq_length: as of `tokenize_questions`.
        doc_stride: likewise.

    Raises:
        DataError: as said.
    """
    for split in splits.values():
        rows = list(zip(values(split, "id"), values(split, "question"), strict=True))
        for first in range(0, len(rows), ROWS_AT_ONCE):
            ids, questions = zip(*rows[first : first + ROWS_AT_ONCE], strict=True)
            asked = [text.strip() for text in questions]
            _refuse_long_questions(list(ids), asked, tokenizer, max_seq_length, doc_stride)


class WindowCollator:
    """Pads windows and stacks them.

    Args:
        tokenizer: the model's tokenizer.
        length: tokens that every window is padded to; None: to the longest of the batch.
        multiple: number that divides the length of every batch.

    Raises:
        DataError: the tokenizer has no padding token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int | None = None, multiple: int | None = None
    ):
        self._pad = padding(tokenizer, length, multiple)
        self._names = frozenset(tokenizer.model_input_names) | {*POSITIONS, "idx"}
        self._pads_left = tokenizer.padding_side == "left"

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch, all int64: token columns (B, L), positions and `idx` (B,)."""
        batch: dict[str, Tensor] = dict(
            self._pad([{name: row[name] for name in row if name in self._names} for row in rows])
        )
        if self._pads_left:  # the tokens have moved
            lengths = batch["idx"].new_tensor([len(row["input_ids"]) for row in rows])
            for name in POSITIONS:
                batch[name] = batch[name] + batch["input_ids"].shape[1] - lengths
        return batch


def _encode(
    rows: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    doc_stride: int,
    training: bool,
) -> dict[str, list[Any]]:
    question_first = tokenizer.padding_side == "right"
    questions, contexts = [text.strip() for text in rows["question"]], rows["context"]
    _refuse_long_questions(rows["id"], questions, tokenizer, max_seq_length, doc_stride)
    encoded = encode(
        tokenizer,
        *((questions, contexts) if question_first else (contexts, questions)),
        truncation="only_second" if question_first else "only_first",
        max_length=max_seq_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns: dict[str, list[Any]] = {
        name: encoded[name] for name in tokenizer.model_input_names if name in encoded
    }
    samples: list[int] = encoded["overflow_to_sample_mapping"]
    offsets = [
        _offsets(mapping, encoded.sequence_ids(window), int(question_first), contexts[samples[window]])
        for window, mapping in enumerate(encoded["offset_mapping"])
    ]
    _refuse_untokenized(rows["id"], samples, offsets)
    places = [
        first_place(context, answers) for context, answers in zip(contexts, rows["answers"], strict=True)
    ]
    cls = [
        _cls_position(ids, tokenizer.cls_token_id, window)
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


def _offsets(
    mapping: list[tuple[int, int]], sequences: list[int | None], context_id: int, context: str
) -> np.ndarray:
    # White space can be a token of its own, but is no part of an answer.
    return np.array(
        [
            (start, end) if sequence == context_id and context[start:end].strip() else (NO_ANSWER_HERE,) * 2
            for (start, end), sequence in zip(mapping, sequences, strict=True)
        ],
        dtype=np.int32,
    )


def _span(place: tuple[int, int] | None, offsets: np.ndarray, fallback: int) -> tuple[int, int]:
    """Return the first and last token of the characters `place`, or twice the fallback if they are not all here."""
    tokens = np.flatnonzero(offsets[:, 0] != NO_ANSWER_HERE)
    if place is None or not len(tokens):
        return fallback, fallback
    starts, ends = offsets[tokens].T
    if place[0] < starts[0] or place[1] > ends[-1]:
        return fallback, fallback
    first = np.searchsorted(ends, place[0], side="right")
    last = np.searchsorted(starts, place[1], side="left") - 1
    return (int(tokens[first]), int(tokens[last])) if first <= last else (fallback, fallback)


def _cls_position(ids: list[int], cls_token_id: Any, offsets: np.ndarray) -> int:
    # Models without such a token are taught to point at the first one that no answer can begin with instead.
    return ids.index(cls_token_id) if cls_token_id in ids else int(np.argmax(offsets[:, 0] == NO_ANSWER_HERE))


def _refuse_long_questions(
    ids: list[str],
    questions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    doc_stride: int,
) -> None:
    lengths = [
        len(tokens)
        for tokens in encode(tokenizer, questions, [""] * len(questions), verbose=False)["input_ids"]
    ]
    longest = int(np.argmax(lengths))
    room = max_seq_length - lengths[longest]
    if room <= doc_stride:
        raise DataError(
            f"question {ids[longest]} takes {lengths[longest]} tokens, which leaves {max(room, 0)} of "
            f"data.max_seq_length={max_seq_length} to the context; expected more than "
            f"data.doc_stride={doc_stride}. Raise the one, lower the other, or shorten the question"
        )


def _refuse_untokenized(ids: list[str], samples: list[int], offsets: list[np.ndarray]) -> None:
    with_tokens = {
        sample
        for sample, window in zip(samples, offsets, strict=True)
        if (window[:, 0] != NO_ANSWER_HERE).any()
    }
    for sample, question in enumerate(ids):
        if sample not in with_tokens:
            raise DataError(
                f"the context of question {question} has no tokens (control characters alone?); remove the row"
            )
