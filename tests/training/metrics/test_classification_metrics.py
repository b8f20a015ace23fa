"""Metrics against values worked out by hand, and their edges."""

from __future__ import annotations

import logging
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaft.errors import ConfigError
from swaft.training.metrics import METRICS, NAMES, get_metric

pytestmark = pytest.mark.unit

# 3 true positives, 1 false positive, 2 false negatives, 2 true negatives.
PREDICTIONS = np.array([1, 1, 1, 1, 0, 0, 0, 0])
REFERENCES = np.array([1, 1, 1, 0, 1, 1, 0, 0])


def test_binary_metrics_of_a_hand_made_table():
    assert get_metric("accuracy").compute(PREDICTIONS, REFERENCES) == {"accuracy": 5 / 8}
    assert get_metric("f1").compute(PREDICTIONS, REFERENCES) == {"f1": pytest.approx(2 * 3 / (2 * 3 + 1 + 2))}
    both = get_metric("accuracy_f1").compute(PREDICTIONS, REFERENCES)
    assert both == {"accuracy": 5 / 8, "f1": pytest.approx(2 / 3)}
    expected = (3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4)
    scores = get_metric("matthews_correlation").compute(PREDICTIONS, REFERENCES)
    assert scores == {"matthews_correlation": pytest.approx(expected)}


def test_macro_f1_is_the_mean_over_classes():
    predictions, references = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    scores = get_metric("f1_macro", num_labels=3).compute(predictions, references)
    assert scores == {"f1_macro": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}


def test_correlations_of_known_series():
    predictions, references = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 16.0])
    scores = get_metric("pearson_spearman", is_regression=True).compute(predictions, references)
    assert scores == {
        "pearson": pytest.approx(np.corrcoef(predictions, references)[0, 1]),
        "spearman": pytest.approx(1),
    }


def test_mse_of_a_single_row():
    assert get_metric("mse", is_regression=True).compute(np.array([1.5]), np.array([3.0])) == {"mse": 2.25}


@pytest.mark.parametrize(("predictions", "references"), [([1, 1, 1], [0, 1, 0]), ([0, 1, 0], [1, 1, 1])])
def test_matthews_of_one_class_is_zero(predictions, references):
    scores = get_metric("matthews_correlation").compute(np.array(predictions), np.array(references))
    assert scores == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("which", ["predictions", "references"])
def test_correlation_of_a_constant_is_zero_with_a_warning(which, caplog):
    constant, varied = np.full(3, 2.0), np.array([1.0, 2.0, 3.0])
    arrays = (constant, varied) if which == "predictions" else (varied, constant)
    with caplog.at_level(logging.WARNING, logger="swaft"):
        scores = get_metric("pearson_spearman", is_regression=True).compute(*arrays)
    assert scores == {"pearson": 0.0, "spearman": 0.0}
    assert f"constant {which}" in caplog.text


def test_f1_is_of_the_second_class_which_is_logged_or_of_the_one_that_is_named(caplog):
    names = ["no", "yes"]
    with caplog.at_level(logging.INFO, logger="swaft"):
        of_yes = get_metric("f1", label_names=names).compute(PREDICTIONS, REFERENCES)
        get_metric("accuracy_f1")
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "f1: the positive class is yes, the second of no, yes",
        "accuracy_f1: the positive class is 1, the second of 0, 1",
    ]
    of_no = get_metric("f1", label_names=names, positive_label="no").compute(PREDICTIONS, REFERENCES)
    assert of_yes == get_metric("f1", label_names=names, positive_label="yes").compute(
        PREDICTIONS, REFERENCES
    )
    # Of "no": 2 true positives, 2 false positives, 1 false negative.
    assert (of_yes, of_no) == ({"f1": pytest.approx(2 / 3)}, {"f1": pytest.approx(4 / 7)})


@pytest.mark.parametrize(
    ("name", "label", "said"),
    [
        ("f1", "maybe", "there is no class 'maybe'; expected one of no, yes"),
        ("accuracy", "no", "positive_label is no, which eval.metric=accuracy does not use"),
    ],
)
def test_a_positive_class_that_does_not_fit_is_refused(name, label, said):
    with pytest.raises(ConfigError, match=said):
        get_metric(name, label_names=["no", "yes"], positive_label=label)


def test_f1_without_any_positive_is_zero():
    zeros = np.zeros(3, dtype=np.int64)
    assert get_metric("f1").compute(zeros, zeros) == {"f1": 0.0}


@pytest.mark.parametrize("name", NAMES["classification"] + NAMES["regression"])
def test_all_numbers_are_there_and_plain_floats(name):
    metric = METRICS[name]
    dtype = np.float32 if metric.is_regression else np.int64
    scores = metric.compute(np.array([0, 1, 1], dtype=dtype), np.array([1, 1, 0], dtype=dtype))
    assert set(metric.names) == set(scores)
    assert all(type(value) is float for value in scores.values())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), st.randoms())
def test_order_of_rows_does_not_matter_and_accuracy_counts_rows(pairs, random):
    metric = get_metric("accuracy", num_labels=4)
    scores = metric.compute(*np.array(pairs).T)
    assert scores["accuracy"] == sum(a == b for a, b in pairs) / len(pairs)
    shuffled = random.sample(pairs, len(pairs))
    assert metric.compute(*np.array(shuffled).T) == scores


def test_unknown_metric_names_the_setting_and_the_nearest():
    with pytest.raises(ConfigError, match=r"eval\.metric: 'acuracy'.*Did you mean 'accuracy'"):
        get_metric("acuracy")


def test_metric_for_another_kind_of_task_is_refused():
    with pytest.raises(ConfigError, match=r"eval\.metric: accuracy does not fit a regression"):
        get_metric("accuracy", is_regression=True)
    with pytest.raises(ConfigError, match=r"eval\.metric: mse does not fit a classification"):
        get_metric("mse")
    with pytest.raises(ConfigError, match="f1_macro"):
        get_metric("f1", num_labels=3)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("cola", "matthews_correlation"),
        ("CoLA", "matthews_correlation"),
        ("mrpc", "accuracy_f1"),
        ("qqp", "accuracy_f1"),
        ("rte", "accuracy"),
        (None, "accuracy"),
    ],
)
def test_auto_follows_glue(task, name):
    assert get_metric(task_name=task).name == name


def test_auto_of_a_regression_is_correlation():
    for task in ("stsb", "mine", None, "cola"):
        metric = get_metric(task_name=task, is_regression=True)
        assert (metric.name, metric.names[0]) == ("pearson_spearman", "pearson")
    assert get_metric(task_name="stsb").name == "accuracy"
    assert get_metric("auto").name == "accuracy"


def test_missing_library_names_the_extra(monkeypatch):
    for name in ("sklearn.metrics", "scipy.stats"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"swaft\[metrics\]"):
        METRICS["f1"].compute(PREDICTIONS, REFERENCES)
    with pytest.raises(ConfigError, match=r"swaft\[metrics\]"):
        METRICS["pearson_spearman"].compute(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    for name in ("f1", "pearson_spearman"):  # as early as it is chosen, before any training
        with pytest.raises(ConfigError, match=r"swaft\[metrics\]"):
            get_metric(name, is_regression=name == "pearson_spearman")
