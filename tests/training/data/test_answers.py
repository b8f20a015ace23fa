"""Scores of tokens become answers: the best span, or none."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from swaft.errors import TrainingError
from swaft.training.data.question_answering import QuestionAnsweringDataConfig as Data
from swaft.training.data.question_answering import tokenize_questions
from swaft.training.evaluation.answering import AnswerSearch, find_answers

pytestmark = pytest.mark.unit

SPLIT = Dataset.from_list(
    [
        {
            "id": name,
            "question": "a b",
            "context": context,
            "answers": {"text": [], "answer_start": []},
        }
        for name, context in (("q1", "c d e  a b c d e"), ("q2", "b c"))
    ]
)
# q1 has windows of the words 0-3, 2-5 and 4-7, at places 4 to 7; q2 has one, at places 4 and 5.
WINDOWS = tokenize_questions(SPLIT, tiny_tokenizer(), Data(max_seq_length=9, doc_stride=2), training=False)


def logits(*marks: tuple[int, int, float], padded: int = 0) -> list[np.ndarray]:
    """Zeros for every token, but for (window, place, score)."""
    found = [np.zeros(len(ids) + padded, dtype=np.float32) for ids in WINDOWS["input_ids"]]
    for window, place, score in marks:
        found[window][place] = score
    return found


def answers(start: list[np.ndarray], end: list[np.ndarray], *, has_unanswerable: bool = False, **options):
    search = AnswerSearch(has_unanswerable=has_unanswerable, **options)
    return find_answers(SPLIT, WINDOWS, list(map(np.stack, zip(start, end, strict=True))), search)


def test_windows_are_as_these_tests_count_them():
    assert WINDOWS["row"][:] == [0, 0, 0, 1]
    assert [len(ids) for ids in WINDOWS["input_ids"]] == [9, 9, 9, 7]


def test_best_span_over_all_windows_is_the_answer_as_the_context_writes_it():
    found = answers(
        logits((0, 6, 2.0), (1, 4, 3.0), (3, 5, 1.0)), logits((0, 7, 2.0), (1, 5, 2.0), (3, 5, 1.0))
    )
    assert found.texts == {"q1": "e  a", "q2": "c"}
    assert found.best_texts == found.texts
    assert found.null_odds == {}


def test_span_of_several_windows_has_its_best_score():
    # The "e" that two windows share; "none" scores 0.
    found = answers(logits((0, 6, 2.0), (1, 4, 3.0)), logits((0, 6, 2.0), (1, 4, 3.0)), has_unanswerable=True)
    assert (found.texts["q1"], found.null_odds["q1"]) == ("e", -6.0)


def test_no_answer_ends_before_it_begins_or_lies_outside_the_context():
    start, end = logits((0, 7, 9.0), (0, 1, 9.0), (0, 0, 9.0)), logits((0, 4, 9.0), (0, 2, 9.0), (0, 8, 9.0))
    found = answers(start, end, has_unanswerable=True)
    # The last word alone, with its start; the first alone has the end: the one that begins first wins.
    assert found.best_texts["q1"] == "c"
    assert found.null_odds["q1"] == 0.0 - 9.0


def test_answers_are_no_longer_than_allowed():
    start, end = logits((0, 4, 2.0)), logits((0, 7, 2.0), (0, 5, 1.0))
    assert answers(start, end).texts["q1"] == "c d e  a"
    assert answers(start, end, max_answer_length=3).texts["q1"] == "c d"
    assert answers(start, end, max_answer_length=1).texts["q1"] == "c"


def test_equal_scores_go_to_the_first_and_shortest():
    assert answers(logits(), logits()).texts == {"q1": "c", "q2": "b"}
    # A later window, and a longer span, score no more.
    found = answers(logits((0, 5, 1.0), (1, 5, 1.0)), logits((0, 6, 1.0), (0, 7, 1.0), (1, 6, 1.0)))
    assert found.texts["q1"] == "d e"


def test_none_wins_above_the_threshold():
    start, end = (
        logits((0, 0, 3.0), (1, 0, 2.0), (2, 0, 4.0), (0, 4, 1.0)),
        logits((0, 0, 1.0), (1, 0, 0.5), (2, 0, 1.0)),
    )
    found = answers(start, end, has_unanswerable=True)
    # "None" of q1 scores 4, 2.5 and 5 in the three windows, and the least counts; the best text has 1.
    assert found.null_odds == {"q1": 1.5, "q2": 0.0}
    assert found.texts == {"q1": "", "q2": "b"}
    assert found.best_texts == {"q1": "c", "q2": "b"}
    assert answers(start, end, has_unanswerable=True, null_score_diff_threshold=1.5).texts["q1"] == "c"
    assert answers(start, end, has_unanswerable=True, null_score_diff_threshold=-0.1).texts["q2"] == ""
    assert answers(start, end).texts["q1"] == "c"  # where every question has an answer, "none" is no choice


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_aside_where_it_stands(side):
    start, end = logits((0, 6, 2.0)), logits((0, 7, 2.0))
    padding = np.full(3, 50.0)
    wide = [
        [np.concatenate([padding, row] if side == "left" else [row, padding]) for row in both]
        for both in (start, end)
    ]
    assert answers(*wide, padding_side=side) == answers(start, end)


def test_half_precision_and_lists_of_scores_serve_too():
    start, end = logits((0, 6, 2.0)), logits((0, 7, 2.0))
    halves = [row.astype(np.float16) for row in start], [row.astype(np.float16) for row in end]
    assert answers(*halves) == answers(start, end)


def test_answers_can_be_written_as_json():
    found = answers(logits(), logits(), has_unanswerable=True)
    assert json.loads(json.dumps(vars(found)))


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_answers_are_those_of_trying_every_span(max_answer_length, seed):
    generator = np.random.default_rng(seed)
    start, end = ([generator.integers(-3, 4, size=len(row)) for row in logits()] for _ in range(2))
    found = answers(start, end, max_answer_length=max_answer_length, has_unanswerable=True)
    for row, (question, context) in enumerate(zip(SPLIT["id"], SPLIT["context"], strict=True)):
        null = math.inf
        scores: dict[tuple[int, int], float] = {}
        for window in np.flatnonzero(np.array(WINDOWS["row"]) == row):
            offsets = WINDOWS["offsets"][int(window)]
            null = min(null, start[window][0] + end[window][0])
            for first, last in itertools.combinations_with_replacement(range(len(offsets)), 2):
                if offsets[first][0] >= 0 and offsets[last][0] >= 0 and last - first < max_answer_length:
                    place = offsets[first][0], offsets[last][1]
                    score = start[window][first] + end[window][last]
                    scores[place] = max(score, scores.get(place, -math.inf))
        (first, last), score = min(scores.items(), key=lambda item: (-item[1], item[0]))
        assert found.best_texts[question] == context[first:last]
        assert found.null_odds[question] == null - score


def byte_level_tokenizer(context: str, padding_side: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([context], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", padding_side=padding_side
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_come_back_where_a_character_takes_several_tokens_and_a_token_begins_with_a_space(side):
    context = "Zoë 🙂🙃 went to São Paulo in 1999,  then  left.\nIt rained… – 日本 too. " * 3
    texts = ["Zoë", "🙂🙃", "São Paulo", "1999", "then  left", "It rained…", "日本"]
    rows = [
        {
            "id": text,
            "question": "who ?",
            "context": context,
            "answers": {"text": [text], "answer_start": [context.rindex(text)]},
        }
        for text in texts
    ]
    split = Dataset.from_list(rows)
    tokenizer = byte_level_tokenizer(context, side)
    windows = tokenize_questions(split, tokenizer, Data(max_seq_length=90, doc_stride=30), training=False)
    perfect = [
        [np.where(np.arange(len(ids)) == at, float(at != cls), 0.0) for ids, at, cls in
         zip(windows["input_ids"], windows[column], windows["cls_position"], strict=True)]
        for column in ("start_positions", "end_positions")
    ]  # fmt: skip
    both = list(map(np.stack, zip(*perfect, strict=True)))
    found = find_answers(split, windows, both, AnswerSearch(has_unanswerable=False))
    assert found.texts == {text: text for text in texts}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    with pytest.raises(TrainingError, match="the logits of window 1 are not finite"):
        answers(logits((1, 4, value)), logits())
