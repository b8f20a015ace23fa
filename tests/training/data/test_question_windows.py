"""Questions become overlapping windows with the tokens of their answers."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from tiny_tokenizer import tiny_tokenizer
from tokenizers import processors

from swaft.errors import DataError
from swaft.training.data.question_answering import QuestionAnsweringDataConfig as Data
from swaft.training.data.question_answering import (
    refuse_unusable_questions,
    require_offsets,
    tokenize_questions,
)
from swaft.training.data.texts import Collator

pytestmark = pytest.mark.unit

# Words are one token each: [CLS] 2, [SEP] 3, a to e 4 to 8. Characters of the words: 0, 2, 4, ...
CONTEXT = "c d e a b c d e"


def questions(*answers: tuple[str, int], question: str = "a b", context: str = CONTEXT) -> Dataset:
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    return Dataset.from_list(
        [
            {
                "id": "q1",
                "question": question,
                "context": context,
                "answers": {"text": texts, "answer_start": starts},
            }
        ]
    )


def windows(split: Dataset, *, length=9, stride=2, training=False, **options) -> Dataset:
    return tokenize_questions(
        split,
        tiny_tokenizer(**options),
        Data(max_seq_length=length, doc_stride=stride),
        training=training,
    )


def test_windows_overlap_and_hold_the_question():
    found = windows(questions(("e a", 4)))
    assert found["input_ids"][:] == [
        [2, 4, 5, 3, 6, 7, 8, 4, 3],  # c d e a
        [2, 4, 5, 3, 8, 4, 5, 6, 3],  # e a b c
        [2, 4, 5, 3, 5, 6, 7, 8, 3],  # b c d e
    ]
    assert found["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert found["idx"][:] == [0, 1, 2]
    assert found["row"][:] == [0, 0, 0]
    assert found["cls_position"][:] == [0, 0, 0]
    nowhere = [-1, -1]
    assert found["offsets"][1] == [*[nowhere] * 4, [4, 5], [6, 7], [8, 9], [10, 11], nowhere]


def test_answer_is_where_a_window_holds_all_of_it_else_at_cls():
    found = windows(questions(("e a", 4)))
    assert found["start_positions"][:] == [6, 4, 0]
    assert found["end_positions"][:] == [7, 5, 0]
    cut = windows(questions(("a b", 6)))  # the first window ends with a
    assert cut["start_positions"][:] == [0, 5, 0]
    assert cut["end_positions"][:] == [0, 6, 0]


def test_question_without_an_answer_points_at_cls():
    found = windows(questions(), training=True)
    assert found["start_positions"][:] == found["end_positions"][:] == [0, 0, 0]


def test_training_windows_hold_only_what_a_model_takes():
    assert set(windows(questions(("e", 4)), training=True).column_names) == {
        "input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions", "idx",
    }  # fmt: skip


def test_first_answer_that_stands_where_it_says_is_trained_on():
    found = windows(questions(("e", 5), ("b", 8), ("c", 0)), length=16)
    assert found["start_positions"][:] == [8]


def test_answer_within_a_word_and_with_white_space_takes_whole_words():
    tokens = questions((" d\te ", 1), context="c d\te dad")
    assert windows(tokens, length=16)["start_positions"][:] == [5]
    assert windows(tokens, length=16)["end_positions"][:] == [6]
    inside = questions(("a", 7), context="c d e dad")
    assert (
        windows(inside, length=16)["start_positions"][:]
        == windows(inside, length=16)["end_positions"][:]
        == [7]
    )


def test_misplaced_questions_are_left_out_of_training_and_kept_for_evaluation(caplog):
    both = Dataset.from_list([*questions(("e", 5)), questions(("e", 4))[0] | {"id": "q2"}])
    with caplog.at_level(logging.WARNING, logger="swaft"):
        found = windows(both, length=16, training=True)
    assert found["start_positions"][:] == [6]
    assert found["idx"][:] == [0]
    assert "1 training questions left out" in caplog.text
    kept = windows(both, length=16)
    assert kept["row"][:] == [0, 1]
    assert kept["start_positions"][:] == [0, 6]


def test_tokenizer_that_pads_on_the_left_takes_the_context_first():
    split = questions(("e a", 4))
    found = windows(split, padding_side="left")
    assert found["input_ids"][0] == [2, 6, 7, 8, 4, 3, 4, 5, 3]
    assert found["start_positions"][:] == [3, 1, 0]
    assert found["offsets"][0] == [[-1, -1], [0, 1], [2, 3], [4, 5], [6, 7], *[[-1, -1]] * 4]


def test_cls_token_is_found_where_it_stands():
    tokenizer = tiny_tokenizer()
    tokenizer.cls_token = "[SEP]"  # the last token, as in XLNet, but for the first of the two
    found = tokenize_questions(questions(), tokenizer, Data(max_seq_length=16, doc_stride=2), training=False)
    assert found["cls_position"][:] == found["start_positions"][:] == [3]


def test_model_without_a_cls_token_points_at_the_first_token():
    found = windows(questions(), length=16, cls_token=None)
    assert found["cls_position"][:] == [0]


def test_model_without_a_cls_token_never_points_at_the_context_for_want_of_an_answer():
    tokenizer = tiny_tokenizer(padding_side="left", cls_token=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A", pair="$A $B:1"
    )
    found = tokenize_questions(questions(), tokenizer, Data(max_seq_length=16, doc_stride=2), training=False)
    assert found["input_ids"][0] == [6, 7, 8, 4, 5, 6, 7, 8, 4, 5]  # the context, and then a b
    assert found["cls_position"][:] == found["start_positions"][:] == found["end_positions"][:] == [8]


def test_batch_is_padded_and_holds_only_what_a_model_takes():
    split = Dataset.from_list(
        [*questions(("e a", 4), context="c d e a"), *questions(("c", 0), context="c d")]
    )
    rows = windows(split, length=16)
    batch = Collator(tiny_tokenizer())([rows[0], rows[1]])
    assert type(batch) is dict
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3, 6, 7, 8, 4, 3], [2, 4, 5, 3, 6, 7, 3, 0, 0]]
    assert batch["start_positions"].tolist() == [6, 4]
    assert batch["end_positions"].tolist() == [7, 4]
    assert batch["idx"].tolist() == [0, 1]
    assert set(batch) == {
        "input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions", "idx",
    }  # fmt: skip
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_positions_move_with_padding_on_the_left():
    split = Dataset.from_list(
        [*questions(("e a", 4), context="c d e a"), *questions(("c", 0), context="c d")]
    )
    rows = windows(split, length=16, padding_side="left")
    batch = Collator(tiny_tokenizer(padding_side="left"))([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[2, 6, 7, 8, 4, 3, 4, 5, 3], [0, 0, 2, 6, 7, 3, 4, 5, 3]]
    assert batch["start_positions"].tolist() == [3, 3]
    assert batch["input_ids"][1, 3] == 6  # c


def test_question_that_leaves_no_room_is_named():
    rows = {"test": questions(question="a " * 5)}

    def judge(length: int) -> None:
        data = Data(max_seq_length=length, doc_stride=2)
        refuse_unusable_questions(rows, tiny_tokenizer(), data)

    judge(11)
    assert len(windows(rows["test"], length=11, stride=2)) == 6
    with pytest.raises(
        DataError, match=r"question q1 takes 8 tokens, which leaves 2 of data\.max_seq_length=10"
    ):
        judge(10)
    with pytest.raises(DataError, match=r"leaves 0 of data\.max_seq_length=7"):
        judge(7)


def test_context_without_tokens_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers_strip()
    rows, data = questions(context="\x00"), Data(max_seq_length=16, doc_stride=2)
    with pytest.raises(DataError, match="the context of question q1 has no tokens"):
        refuse_unusable_questions({"test": rows}, tokenizer, data)
    refuse_unusable_questions({"test": questions(context="a \x00")}, tokenizer, data)


def tokenizers_strip():
    from tokenizers import normalizers

    return normalizers.Replace("\x00", "")


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"Slow does not say which characters.*fast tokenizer"):
        require_offsets(Slow())  # type: ignore[arg-type]
