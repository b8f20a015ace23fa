"""Scores of whole sets of generated texts, and the texts that are refused."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

from swaft.errors import ConfigError
from swaft.training.data.seq2seq import bleu_language
from swaft.training.evaluation.generation import (
    METRICS,
    bootstrap_intervals,
    get_generation_metric,
)
from swaft.training.metrics import NAMES, get_metric

pytestmark = pytest.mark.unit

PREDICTION, REFERENCE = "the cat sat on the mat", "the cat sat on the rug"
CHALLENGE = ["the cat sat on the mat", "a dog barked at me"]
REFERENCES = [["the cat sat on the rug"], ["a dog barked", "the dog barked at me", "one dog barks at me"]]


def test_the_table_holds_what_the_names_promise():
    assert set(METRICS) == set(NAMES["generation"])


@pytest.mark.parametrize("name", NAMES["generation"])
def test_a_perfect_text_scores_100_and_every_number_says_how_it_was_made(name):
    result = METRICS[name].compute(["We love this old pub."], [["We love this old pub."]])
    assert result.scores == dict.fromkeys(result.scores, pytest.approx(100))
    assert set(METRICS[name].names) == set(result.scores)
    assert set(result.signatures) == set(result.scores)
    assert all(type(value) is float for value in result.scores.values())


@pytest.mark.parametrize("name", NAMES["generation"])
def test_empty_predictions_count_and_score_nothing(name):
    one = METRICS[name].compute(["We love this old pub."], [["We love this old pub."]])
    half = METRICS[name].compute(
        ["We love this old pub.", ""], [["We love this old pub."], ["Some other words."]]
    )
    assert all(half.scores[number] < one.scores[number] for number in one.scores)


def test_bleu_of_one_wrong_word():
    result = get_generation_metric("bleu").compute([PREDICTION], [[REFERENCE]])
    assert result.scores == {"bleu": pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)}
    assert result.signatures == {"bleu": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"}
    assert result.intervals == {}


def test_bleu_counts_over_the_whole_set_and_over_all_references():
    result = get_generation_metric("bleu").compute(CHALLENGE, REFERENCES)
    # Words 5 + 5 of 11, pairs 4 + 4 of 9, triples 3 + 3 of 7, fours 2 + 1 of 5; no text is too short.
    expected = 100 * (10 / 11 * 8 / 9 * 6 / 7 * 3 / 5) ** 0.25
    assert result.scores["bleu"] == pytest.approx(expected)
    assert "nrefs:var" in result.signatures["bleu"]


def test_chrf_of_one_wrong_letter():
    result = get_generation_metric("chrf").compute(["abc"], [["abd"]])
    assert result.scores == {"chrf": pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)}
    assert result.signatures == {"chrf": "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0"}


def test_chrf_takes_the_best_reference():
    chrf = get_generation_metric("chrf")
    assert chrf.compute(["abc", "xyz"], [["q", "abc"], ["xyz"]]).scores["chrf"] == pytest.approx(100)


def test_rouge_is_the_plain_mean_over_rows():
    result = get_generation_metric("rouge").compute([PREDICTION, "p q"], [[REFERENCE], ["x y"]])
    assert result.scores["rouge1"] == pytest.approx(100 * (5 / 6 + 0) / 2)
    assert "stem:porter" in result.signatures["rouge1"]
    assert set(result.scores) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_the_two_kinds_of_rouge_l_stand_side_by_side_under_names_of_their_own():
    result = get_generation_metric("bleu_rouge").compute(["p q r s"], [["p q", "p q r x y z"]])
    assert set(result.scores) == {"bleu", "rougeL_coco", "rougeL"}
    assert result.scores["rougeL"] < result.scores["rougeL_coco"]
    assert "beta:1.2" in result.signatures["rougeL_coco"]
    assert "stem:porter" in result.signatures["rougeL"]


def test_intervals_hold_the_mean_and_come_again():
    predictions = [f"p q {i}" for i in range(40)]
    references = [["p q r" if i % 3 else f"p q {i}"] for i in range(40)]
    metric = get_generation_metric("rouge")
    first = metric.compute(predictions, references)
    assert first == metric.compute(predictions, references)
    low, high = first.intervals["rouge1"]
    assert low < first.scores["rouge1"] < high
    values = np.arange(40.0)[:, None]
    one, again, other = (bootstrap_intervals(values, samples=9, seed=seed) for seed in (3, 3, 4))
    assert (one == again).all()
    assert (one != other).any()


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    values = np.tile([[0.0, 5.0], [1.0, 5.0]], (200, 1))
    (low, constant_low), (high, constant_high) = bootstrap_intervals(values, samples=2000, seed=0)
    half = 1.96 * 0.5 / np.sqrt(400)
    assert low == pytest.approx(0.5 - half, abs=0.006)
    assert high == pytest.approx(0.5 + half, abs=0.006)
    assert constant_low == constant_high == 5


def test_texts_in_another_script_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="swaft"):
        scores = METRICS["rouge"].compute(["你好", "yes"], [["你好"], ["yes"]]).scores
    assert scores["rouge1"] == 50
    assert "1 of 2 rows" in caplog.text
    assert "chrf" in caplog.text


CHINESE = ["我今天很高兴见到你们所有人。", "他们昨天去了北京旅游。"]


def test_the_right_chinese_texts_have_a_bleu_of_100(caplog):
    result = get_generation_metric(translates=True, language="zho_Hans").compute(
        CHINESE, [[text] for text in CHINESE]
    )
    assert result.scores == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    assert "tok:zh" in result.signatures["bleu"]
    assert caplog.text == ""


def test_bleu_of_texts_without_spaces_is_warned_of(caplog):
    references = [[CHINESE[0]], ["the cat sat"], ["วันนี้อากาศดีมาก"], ["今日はとても寒い。", "it is cold"]]
    with caplog.at_level(logging.WARNING, logger="swaft"):
        get_generation_metric("bleu").compute(["x"] * 4, references)
        get_generation_metric("chrf").compute(["x"] * 4, references)
    [record] = caplog.records
    assert "2 of 4 rows have no reference with spaces between words" in record.message
    assert "eval.metric=chrf" in record.message
    assert "data.target_lang" in record.message


@pytest.mark.parametrize(
    ("code", "language"),
    [
        ("zh_CN", "zh"),
        ("zho_Hant", "zh"),
        ("zh-TW", "zh"),
        ("ja_XX", "ja"),
        ("kor_Hang", "ko"),
        ("fr", ""),
        (None, ""),
    ],
)
def test_languages_that_bleu_splits_are_known_by_every_code(code, language):
    assert bleu_language(code) == language


def test_a_missing_tokenizer_for_a_language_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    for name in ("auto", "bleu", "bleu_rouge"):
        with pytest.raises(ConfigError, match=r"sacrebleu\[ja\].* eval\.metric=chrf"):
            get_generation_metric(name, translates=True, language="ja")
    assert get_generation_metric("chrf", language="ja").name == "chrf"


def test_auto_is_rouge_except_for_translations():
    assert get_generation_metric().name == "rouge"
    assert get_generation_metric(translates=True).name == "bleu_chrf"


def test_metric_of_another_kind_of_task_is_refused():
    with pytest.raises(
        ConfigError, match=r"eval\.metric: accuracy does not fit a generation task; use auto, rouge"
    ):
        get_generation_metric("accuracy")
    with pytest.raises(ConfigError, match=r"eval\.metric: rouge does not fit a classification"):
        get_metric("rouge")
    with pytest.raises(ConfigError, match=r"'bleau' is not one of .*Did you mean 'bleu'"):
        get_generation_metric("bleau")


@pytest.mark.parametrize(("library", "name"), [("rouge_score.tokenizers", "rouge"), ("sacrebleu", "bleu")])
def test_missing_library_names_the_extra(monkeypatch, library, name):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"swaft\[metrics\]"):
        METRICS[name].compute(["a"], [["a"]])
    with pytest.raises(
        ConfigError, match=r"swaft\[metrics\]"
    ):  # as early as it is chosen, before any training
        get_generation_metric(name)
