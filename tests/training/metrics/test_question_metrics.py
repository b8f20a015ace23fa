"""Answers against golden cases written out by hand after the official SQuAD scripts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaft.errors import ConfigError
from swaft.training.evaluation.answering import (
    exact_match,
    get_question_metric,
    normalize_answer,
    score_squad,
    score_squad_v2,
    token_f1,
    token_f1_v2,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat!", "cat"),
        ("an apple\ta day\n", "apple day"),
        ("theater and another", "theater and another"),  # articles inside words stay
        ("A.B.C.", "abc"),  # points first, so no article is left
        ("the-end", "theend"),
        ("a", ""),
        ("...", ""),
        ("“quoted” – dash…", "“quoted” – dash…"),  # punctuation beyond ASCII stays
        ("l'an 2000", "lan 2000"),
        ("the\u00a0end", "end"),  # a hard space is white space
        ("ÉTÉ a été", "été été"),
        ("$5.50", "550"),
    ],
)
def test_an_answer_is_compared_without_case_punctuation_and_articles(text, normal):
    assert normalize_answer(text) == normal


# answer, right answer, exact match, F1 of SQuAD 1.1, F1 of SQuAD 2.0
GOLDEN = [
    ("the Eiffel Tower", "Eiffel tower.", 1, 1, 1),
    ("in the Eiffel Tower", "Eiffel Tower", 0, 4 / 5, 4 / 5),  # 2 of 3 words, 2 of 2
    ("five or six", "six or seven", 0, 2 / 3, 2 / 3),
    ("no no yes", "no yes yes", 0, 2 / 3, 2 / 3),  # words count as often as both have them
    ("London", "Paris", 0, 0, 0),
    ("", "Paris", 0, 0, 0),
    ("the", "an", 1, 0, 1),  # nothing is left of either
    ("", "", 1, 0, 1),
    ("the", "Paris", 0, 0, 0),
    ("“Paris”", "Paris", 0, 0, 0),  # other quotes are part of the word
    ("1,000", "1000", 1, 1, 1),
]


@pytest.mark.parametrize(("answer", "right", "exact", "f1", "f1_v2"), GOLDEN)
def test_an_answer_scores_what_the_official_scripts_give_it(answer, right, exact, f1, f1_v2):
    assert exact_match(answer, right) == exact
    assert token_f1(answer, right) == pytest.approx(f1)
    assert token_f1_v2(answer, right) == pytest.approx(f1_v2)


@given(st.text(" .abthe", max_size=12), st.text(" .abthe", max_size=12))
def test_scores_are_symmetric_and_an_exact_match_has_an_f1_of_one(first, second):
    assert token_f1(first, second) == pytest.approx(token_f1(second, first))
    if exact_match(first, second):
        assert token_f1_v2(first, second) == 1


def test_each_score_takes_the_best_right_answer():
    questions = [("q1", ["the tall red tower", "tower"]), ("q2", ["two"])]
    result = score_squad({"q1": "tall tower", "q2": "two"}, questions)
    # q1: F1 is 2·1·(2/3)/(1 + 2/3) = 0.8 with the first, 2/3 with the second.
    assert result == {"exact_match": 50, "f1": pytest.approx(100 * (0.8 + 1) / 2)}


def test_missing_answers_score_nothing():
    questions = [("q1", ["one"]), ("q2", ["two"]), ("q3", [])]
    assert score_squad({"q2": "two"}, questions[:2]) == {"exact_match": 50, "f1": 50}
    result = score_squad_v2({"q2": "two"}, questions)
    assert result["exact"] == pytest.approx(100 / 3)
    assert result["NoAns_exact"] == 0


def test_parts_of_the_second_version():
    questions = [("h1", ["one"]), ("h2", ["two words"]), ("n1", []), ("n2", []), ("n3", [])]
    answers = {"h1": "one", "h2": "two", "n1": "", "n2": "wrong", "n3": "the"}
    result = score_squad_v2(answers, questions)
    # "the" is "none" once normalised, as in the official script.
    assert result == {
        "exact": pytest.approx(100 * (1 + 0 + 1 + 0 + 1) / 5),
        "f1": pytest.approx(100 * (1 + 2 / 3 + 1 + 0 + 1) / 5),
        "HasAns_exact": 50,
        "HasAns_f1": pytest.approx(100 * (1 + 2 / 3) / 2),
        "NoAns_exact": pytest.approx(200 / 3),
        "NoAns_f1": pytest.approx(200 / 3),
    }


def test_part_without_questions_is_left_out():
    assert set(score_squad_v2({"q": "a"}, [("q", ["a"])])) == {
        "exact",
        "f1",
        "HasAns_exact",
        "HasAns_f1",
    }
    assert set(score_squad_v2({"q": "a"}, [("q", [])])) == {"exact", "f1", "NoAns_exact", "NoAns_f1"}


def test_right_answers_without_words_are_dropped():
    questions = [("q1", ["the", "tower"]), ("q2", ["a"])]
    result = score_squad_v2({"q1": "", "q2": ""}, questions)
    assert result["exact"] == 50  # q1 has "tower" left; of q2 nothing is left, so "none" is right


QUESTIONS = [("h1", ["one"]), ("h2", ["two words"]), ("n1", []), ("n2", [])]
ANSWERS = {"h1": "one", "h2": "two", "n1": "some", "n2": "other"}
ODDS = {"h1": -3.0, "n1": -1.0, "h2": 0.5, "n2": 2.0}


def test_threshold_decides_who_is_silent():
    # At 0, h1 (right) and n1 (wrong) answer; h2 is silent (wrong) and n2 too (right).
    at_zero = score_squad_v2(ANSWERS, QUESTIONS, ODDS)
    assert (at_zero["exact"], at_zero["f1"]) == (50, 50)
    # Up to 1, h2 answers too: no exact match, but two thirds of F1.
    at_one = score_squad_v2(ANSWERS, QUESTIONS, ODDS, null_score_diff_threshold=1.0)
    assert at_one["exact"] == 50
    assert at_one["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4)


def test_a_question_at_the_threshold_answers():
    assert score_squad_v2(ANSWERS, QUESTIONS, ODDS, null_score_diff_threshold=-3.0)["exact"] == 75


def test_best_threshold_by_hand():
    scores = score_squad_v2(ANSWERS, QUESTIONS, ODDS)
    # Silence: 2 right. Up to -3: h1 too, 3. Up to -1: n1 lost, 2. Up to 0.5: h2, 2 + 2/3 of F1. Then n2 lost.
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (75, -3.0)
    assert (scores["best_f1"], scores["best_f1_thresh"]) == (75, -3.0)


def test_of_equally_good_thresholds_the_lowest_is_told():
    assert score_squad_v2(ANSWERS, QUESTIONS[:2], ODDS)["best_exact_thresh"] == -3.0  # at 0.5 h2 is wrong too


def test_missing_answers_score_nothing_at_the_best_threshold_either():
    answers = {name: answer for name, answer in ANSWERS.items() if name != "n2"}
    # Silence: n1 right. Up to -3: h1 too. Nothing was said of n2.
    assert score_squad_v2(answers, QUESTIONS, ODDS)["best_exact"] == 100 * 2 / 4
    assert score_squad_v2({}, QUESTIONS, {})["best_exact"] == 0


def test_silence_may_be_best_and_its_threshold_brings_it_about():
    questions, answers, odds = [("n1", []), ("h1", ["x"])], {"n1": "a", "h1": "b"}, {"n1": -2.0, "h1": -1.0}
    scores = score_squad_v2(answers, questions, odds)
    assert scores["best_exact"] == 50
    again = score_squad_v2(answers, questions, odds, null_score_diff_threshold=scores["best_exact_thresh"])
    assert again["exact"] == 50


def test_equal_odds_stay_together():
    questions, answers, odds = [("a", ["x"]), ("b", [])], {"a": "x", "b": "y"}, {"a": 1.0, "b": 1.0}
    # An order within the tie would promise 100 at a threshold that gives 50.
    assert score_squad_v2(answers, questions, odds)["best_exact"] == 50


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "x", "x y", "z"]), st.sampled_from([(), ("x",), ("x y", "w")]),
                  st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_best_scores_are_what_some_threshold_gives_and_no_threshold_gives_more(rows):
    questions = [(str(i), right) for i, (_, right, _) in enumerate(rows)]
    answers = {str(i): answer for i, (answer, _, _) in enumerate(rows)}
    odds = {str(i): value for i, (_, _, value) in enumerate(rows)}
    scores = score_squad_v2(answers, questions, odds)
    for name in ("exact", "f1"):
        found = {
            threshold: score_squad_v2(answers, questions, odds, null_score_diff_threshold=threshold)[name]
            for threshold in (-9.0, *odds.values(), scores[f"best_{name}_thresh"])
        }
        assert scores[f"best_{name}"] == pytest.approx(max(found.values()))
        assert found[scores[f"best_{name}_thresh"]] == pytest.approx(max(found.values()))


def test_the_metric_fits_the_questions():
    assert get_question_metric().name == "squad"
    assert get_question_metric(has_unanswerable=True).name == "squad_v2"
    assert get_question_metric("squad_v2").name == "squad_v2"
    with pytest.raises(ConfigError, match="squad cannot score questions that have no answer"):
        get_question_metric("squad", has_unanswerable=True)
    with pytest.raises(ConfigError, match=r"eval\.metric: rouge does not fit a question answering task"):
        get_question_metric("rouge")
