"""Questions that cannot be used are named, and answers that stand elsewhere are counted."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset

from swaft.errors import ConfigError, DataError
from swaft.training.data import question_answering
from swaft.training.data.question_answering import check_questions, may_have_no_answer, right_answers

pytestmark = pytest.mark.unit


def row(**changes) -> dict:
    answers = {"text": ["b c", "c"], "answer_start": [2, 4]}
    return {"id": "q1", "question": "who?", "context": "a b c d", "answers": answers} | changes


def check(*rows: dict, **options):
    return check_questions({"train": Dataset.from_list(list(rows))}, **options)


UNANSWERABLE = row(id="q2", answers={"text": [], "answer_start": []})


def test_questions_without_an_answer_make_the_second_version():
    assert may_have_no_answer(check(row()), None) is False
    assert may_have_no_answer(check(row(), UNANSWERABLE), None) is True


def test_right_answers_go_by_id():
    split = Dataset.from_list([row(), UNANSWERABLE])
    assert right_answers(split) == [("q1", ["b c", "c"]), ("q2", [])]


def test_misplaced_answers_are_counted_and_refused_beyond_a_share(caplog, monkeypatch):
    odd = row(id="q2", answers={"text": ["b c", "d"], "answer_start": [1, -1]})
    with caplog.at_level(logging.WARNING, logger="swaft"):
        monkeypatch.setattr(question_answering, "MOST_MISPLACED", 0.5)
        check(row(), odd)
    assert "2 of 4 answers of train do not stand where answer_start says (row 2, ...)" in caplog.text
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"2 of 4 answers of train .*\(row 2, \.\.\.\); expected at most 1%"):
        check(row(), odd)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": " "}, "row 2 of train has an empty text in column 'question'"),
        ({"context": "\n"}, "row 2 of train has an empty text in column 'context'"),
        ({"context": None}, "row 2 of train has nothing in column 'context'; expected text.*fill it in"),
        ({"id": "q1"}, "1 values of column 'id' are in several rows of train"),
        ({"answers": None}, "row 2 of train has None in column 'answers'; expected {'text'"),
        ({"answers": {"text": ["a"], "answer_start": []}}, "lists of the same length"),
        ({"answers": {"text": [" "], "answer_start": [1]}}, "row 2 of train has the answer ' ' at 1"),
        ({"answers": {"text": ["a"], "answer_start": [None]}}, "row 2 of train has the answer 'a' at None"),
    ],
)
def test_row_that_cannot_be_used_is_named(changes, said):
    with pytest.raises(DataError, match=said):
        check(row(), row(**({"id": "q2"} | changes)))


def test_bad_rows_are_left_out_when_asked():
    bad = [
        row(id="2", question=" "),
        row(id="3", context=None),
        row(id="4", answers={"text": [" "], "answer_start": [1]}),
    ]
    rows = check(*bad, row(), UNANSWERABLE, skip_bad_rows=True)
    assert rows["train"]["id"][:] == ["q1", "q2"]


def test_missing_column_is_named():
    with pytest.raises(
        DataError, match="the train split has no column 'answers'; the columns are id, question"
    ):
        check({"id": "1", "question": "a", "context": "b"})


def test_the_setting_decides_whether_none_is_an_answer_else_the_questions_do():
    first, second = check(row()), check(row(), UNANSWERABLE)
    assert (may_have_no_answer(first, None), may_have_no_answer(first, True)) == (False, True)
    assert (may_have_no_answer(second, None), may_have_no_answer(second, True)) == (True, True)
    assert may_have_no_answer(first, False) is False
    with pytest.raises(ConfigError, match=r"version_2_with_negative is false, .* no answer \(1 of train\)"):
        may_have_no_answer(second, False)


def test_whole_numbers_as_ids_become_texts():
    assert right_answers(check(row(id=7))["train"]) == [("7", ["b c", "c"])]
