"""ROUGE of single texts against values worked out by hand."""

from __future__ import annotations

import socket
from itertools import combinations

import nltk
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaft.training.evaluation.generation import (
    coco_tokens,
    longest_common_subsequence,
    rouge_l_coco,
    rouge_scorer,
    split_sentences,
)

pytestmark = pytest.mark.unit


def test_one_word_of_six_differs():
    scores = rouge_scorer()("the cat sat on the mat", ["the cat was on the mat"])
    assert scores == {
        "rouge1": pytest.approx(5 / 6),  # words
        "rouge2": pytest.approx(3 / 5),  # pairs: the cat, on the, the mat
        "rougeL": pytest.approx(5 / 6),
        "rougeLsum": pytest.approx(5 / 6),
    }


def test_each_number_takes_the_reference_that_suits_it():
    scores = rouge_scorer()("p q r s", ["p q x y", "s r q p"])
    assert scores["rouge1"] == pytest.approx(1)  # second reference: the same words
    assert scores["rouge2"] == pytest.approx(1 / 3)  # first: p q
    assert scores["rougeL"] == pytest.approx(1 / 2)  # first: p q, against one word of the second


def test_english_words_are_compared_by_their_stems():
    assert rouge_scorer()("running dogs", ["runs dog"])["rouge1"] == pytest.approx(1)


def test_sentences_may_change_their_order_in_rouge_lsum_alone():
    scores = rouge_scorer()("Red fox ran. Blue bird sang.", ["Blue bird sang. Red fox ran."])
    assert scores["rougeL"] == pytest.approx(3 / 6)
    assert scores["rougeLsum"] == pytest.approx(1)


def test_empty_prediction_scores_nothing():
    assert set(rouge_scorer()("", ["some text"]).values()) == {0.0}
    assert rouge_l_coco("", ["some text"]) == 0


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("It costs 3.50 pounds. 4 people ate", ["It costs 3.50 pounds.", "4 people ate"]),
        ("approx. five, e.g. this one", ["approx. five, e.g. this one"]),  # a small letter goes on
        ("Eins. Über zwei.", ["Eins.", "Über zwei."]),
        ("first line. Not split\n\n  second ", ["first line. Not split", "second"]),
        ("Dr. Who", ["Dr.", "Who"]),  # as documented: no list of abbreviations
        ("   ", []),
    ],
)
def test_a_text_is_split_into_its_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_coco_takes_precision_and_recall_from_different_references():
    # First reference: 2 of 4 predicted words, all of its own. Second: 3 of 4, half of its own.
    precision, recall = 3 / 4, 1
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l_coco("p q r s", ["p q", "p q r x y z"]) == pytest.approx(expected)


def test_coco_of_one_reference_weighs_recall_more():
    shorter, longer = rouge_l_coco("p q", ["p q r s"]), rouge_l_coco("p q r s", ["p q"])
    assert shorter == pytest.approx(2.44 * 1 * 0.5 / (0.5 + 1.44 * 1))
    assert longer == pytest.approx(2.44 * 0.5 * 1 / (1 + 1.44 * 0.5))
    assert shorter < longer


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Vaults, a family-friendly pub.", ["the", "vaults", "a", "family-friendly", "pub"]),
        ("It isn't £20-25!", ["it", "is", "n't", "£", "20-25"]),
        ("Alimentum’s near 30,000 o'clock", ["alimentum", "'s", "near", "30,000", "o'clock"]),
        ("red,blue (green) - “Café”", ["red", "blue", "green", "café"]),
        ("... !", []),
    ],
)
def test_words_for_coco_are_lower_case_and_without_punctuation(text, tokens):
    assert coco_tokens(text) == tokens


@given(st.text("ab", max_size=6), st.text("abc", max_size=6))
def test_common_subsequence_is_the_longest(first, second):
    def subsequences(text):
        return {"".join(some) for size in range(len(text) + 1) for some in combinations(text, size)}

    expected = max(map(len, subsequences(first) & subsequences(second)))
    assert longest_common_subsequence(first, second) == expected


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(nltk, "download", refuse)
    assert rouge_scorer()("Two dogs ran. They slept.", ["Two dogs ran.\nThey slept."])["rougeLsum"] == 1
