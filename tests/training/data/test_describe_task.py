"""Columns are found, labels are read, and rows that do not fit are named."""

from __future__ import annotations

import logging
import math
from datetime import date
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from swaft.errors import DataError
from swaft.training.data.classification import DataConfig, Task, describe_task

pytestmark = pytest.mark.unit


def split(labels: list, **columns: list) -> Dataset:
    return Dataset.from_dict({**(columns or {"text": ["a"] * len(labels)}), "label": labels})


def describe(train: list, validation: list | None = None, /, **settings: Any) -> Task:
    splits = {"train": split(train)}
    if validation is not None:
        splits["validation"] = split(validation)
    return describe_task(splits, DataConfig(**settings))


@pytest.mark.parametrize(
    "columns",
    [
        ("sentence",), ("text",), ("sentence1", "sentence2"), ("question", "sentence"),
        ("question1", "question2"), ("premise", "hypothesis"), ("text_a", "text_b"),
    ],
)  # fmt: skip
def test_usual_columns_are_found_by_name(columns):
    train = split([0, 1], **{column: ["a", "b"] for column in reversed(columns)}, idx=[0, 1])
    assert describe_task({"train": train}, DataConfig()).text_columns == columns


def test_named_columns_win_over_usual_ones():
    train = Dataset.from_dict(
        {"text": ["a", "b"], "body": ["c", "d"], "head": ["e", "f"], "label": [0, 1], "fine": [2, 0]}
    )
    task = describe_task({"train": train}, DataConfig(text_column="body", label_column="fine"))
    assert (task.text_columns, task.label_column, task.num_labels) == (("body",), "fine", 3)
    task = describe_task({"train": train}, DataConfig(text_column="head", text_pair_column="body"))
    assert task.text_columns == ("head", "body")


@pytest.mark.parametrize("setting", ["text_column", "label_column"])
def test_missing_column_lists_those_there_are(setting):
    with pytest.raises(DataError, match=rf"data\.{setting}: .*'txet'; the columns are text, label"):
        describe([0, 1], **{setting: "txet"})


def test_misspelt_column_gets_a_suggestion():
    with pytest.raises(DataError, match="Did you mean 'text'"):
        describe([0, 1], text_column="txt")


def test_unusual_columns_have_to_be_named():
    rows = Dataset.from_dict({"body": ["a"], "answer": [1]})
    with pytest.raises(DataError, match=r"body, answer; set data\.text_column"):
        describe_task({"train": rows}, DataConfig())
    with pytest.raises(DataError, match=r"body, answer; set data\.label_column"):
        describe_task({"train": rows}, DataConfig(text_column="body"))


def test_split_without_the_column_is_named():
    splits = {"train": split([0, 1]), "test": Dataset.from_dict({"text": ["a"]})}
    with pytest.raises(DataError, match="the test split has no column 'label'"):
        describe_task(splits, DataConfig())


@pytest.mark.parametrize("value", [None, 3])
def test_row_without_text_is_named(value):
    text = ["a", value] if value is None else [value, value]
    with pytest.raises(
        DataError, match=rf"row {2 if value is None else 1} of train .* 'text'; expected text"
    ):
        describe_task({"train": split([0, 1], text=text)}, DataConfig())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ([3, 4], "has 3 in column 'text'; expected text, .* type int; write the texts as json lines"),
        ([date(2021, 3, 4)] * 2, "type date; write the texts as parquet"),
        (
            [{"0": "a" * 1000, "1": "b"}] * 2,
            r".{,150}write texts, and one object per row: df\.to_json\(FILE, orient='records'",
        ),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_column_of_another_type_is_refused_and_not_left_out_row_by_row(text, said, skip):
    splits = {"train": split([0, 1]), "validation": split([0, 1], text=text)}
    with pytest.raises(DataError, match="row 1 of validation .*" + said):
        describe_task(splits, DataConfig(skip_bad_rows=skip))


def test_texts_among_values_of_other_types_are_refused_since_json_decodes_them():
    rows = Dataset.from_dict({"text": ['"a"', "b", 7], "label": [0, 1, 1]}, on_mixed_types="use_json")
    with pytest.raises(DataError, match=r"row 3 of train has 7 in column 'text'.*values of several types"):
        describe_task({"train": rows}, DataConfig(skip_bad_rows=True))


def test_fractions_make_a_regression():
    task = describe([0.5, 4.0], [1.0, 2.0])
    assert (task.is_regression, task.num_labels, task.label_names) == (True, 1, None)
    assert str(task) == "text -> label, scores"


def test_whole_numbers_stored_as_fractions_may_be_either_so_they_are_asked_about():
    with pytest.raises(DataError, match=r"class ids or scores\? Set data\.do_regression=false"):
        describe([0.0, 1.0, 1.0])
    assert describe([0.0, 1.0, 1.0], do_regression=True).is_regression
    assert describe([0.0, 1.0, 1.0], do_regression=False).num_labels == 2
    assert describe([0, 1, 5], do_regression=True).is_regression


def test_fractions_are_no_class_ids_whatever_is_asked():
    with pytest.raises(DataError, match=r"data\.do_regression=true"):
        describe([0.5, 1.0], do_regression=False)


def test_a_number_that_is_no_class_id_is_refused_before_it_takes_the_memory():
    with pytest.raises(DataError, match=r"row 2 of train has label=1000000000000.*data\.label_column"):
        describe([0, 10**12])


def test_whole_numbers_in_a_small_split_of_a_regression_are_scores():
    assert describe([0.5, 4.0], [1, 2]).is_regression


def test_whole_numbers_in_train_and_fractional_ones_elsewhere_are_what_is_asked_for():
    assert describe([0, 1, 2], [0.5, 1.0], do_regression=True).is_regression
    assert describe([0, 1, 2], [2.0, 1.0]).num_labels == 3
    with pytest.raises(DataError, match=r"of validation holds fractional numbers.*data\.do_regression=true"):
        describe([0, 1, 2], [0.5, 1.0])


def test_texts_are_classes_in_sorted_order_of_the_training_rows():
    task = describe(["pos", "neg", "pos", "mid"], ["neg", "mid"])
    assert (task.label_names, task.num_labels, task.is_regression) == (["mid", "neg", "pos"], 3, False)


def test_text_label_that_no_training_row_has_is_named():
    with pytest.raises(DataError, match=r"row 2 of validation has label='new'.*data\.validation_fraction"):
        describe(["pos", "neg"], ["neg", "new"])


def test_whole_numbers_are_classes_up_to_the_largest_of_the_training_rows():
    task = describe([0, 3, 1])
    assert (task.num_labels, task.label_names) == (4, None)
    assert describe([True, False]).num_labels == 2


def test_classes_that_no_training_row_has_are_told(caplog):
    with caplog.at_level(logging.INFO, logger="swaft"):
        describe([0, 3, 1])
    assert "label: class ids 0 to 3; no training row has 2" in caplog.text


@pytest.mark.parametrize(
    ("labels", "names"),
    [([6, 1, 3, 2, 4, 5], ["1", "2", "3", "4", "5", "6"]), ([4, 2], ["2", "4"]), ([1, -1], ["-1", "1"])],
)
def test_whole_numbers_without_0_are_as_many_classes_as_there_are_numbers(labels, names, caplog):
    with caplog.at_level(logging.INFO, logger="swaft"):
        task = describe(labels, labels[:1])
    assert (task.num_labels, task.label_names) == (len(names), names)
    assert [task.label_ids[int(name)] for name in names] == list(range(len(names)))
    assert (
        f"label: whole numbers without 0 are names of {len(names)} classes: {', '.join(names)}" in caplog.text
    )
    with pytest.raises(DataError, match="row 1 of validation has label=9, which no training row has"):
        describe(labels, [9])


def test_bad_rows_are_left_out_when_asked_and_said(caplog):
    named = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    train = Dataset.from_dict(
        {"text": ["a", None, " ", "d", "e"], "label": [0, 1, 1, None, 1]}, features=named
    )
    test = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=named)
    splits = {"train": train, "validation": train, "test": test}
    with pytest.raises(DataError, match=r"row 2 of train has nothing .*data\.skip_bad_rows=true"):
        describe_task(splits, DataConfig())
    with caplog.at_level(logging.INFO, logger="swaft"):
        task = describe_task(splits, DataConfig(skip_bad_rows=True))
    left = {name: rows["text"][:] for name, rows in task.rows.items()}
    assert left == {"train": ["a", "e"], "validation": ["a", "e"]}
    assert "3 of 5 rows of train are left out: 2, 3, 4 (row 2 has nothing in column 'text'" in caplog.text
    assert "2 of 2 rows of test are left out: 1, 2 (row 1 has label=-1, which marks a row" in caplog.text
    with pytest.raises(DataError, match=r"no row of train is left: all are bad \(row 1 has nothing"):
        describe_task({"train": split([0, 1], text=[None, None])}, DataConfig(skip_bad_rows=True))


def test_scores_that_are_withheld_are_told_from_scores():
    splits = {"train": split([0.5, -1.0]), "validation": split([-1.0, 1.5]), "test": split([-1.0, -1.0])}
    with pytest.raises(DataError, match="row 1 of test has label=-1, which marks a row without its answer"):
        describe_task(splits, DataConfig())
    assert {*describe_task(splits, DataConfig(skip_bad_rows=True)).rows} == {"train", "validation"}


def test_class_names_of_the_column_type_are_kept():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y", "z"])})
    train = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    task = describe_task({"train": train, "validation": train}, DataConfig())
    assert (task.num_labels, task.label_names) == (3, ["x", "y", "z"])


def test_class_names_that_differ_between_splits_are_refused():
    def named(names):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)

    with pytest.raises(DataError, match="names its classes"):
        describe_task({"train": named(["x", "y"]), "validation": named(["y", "x"])}, DataConfig())


@pytest.mark.parametrize(("value", "row"), [(-1, 3), (3, 3)])
def test_label_out_of_range_names_split_row_and_value(value, row):
    with pytest.raises(
        DataError, match=rf"row {row} of validation has label={value}; expected 0 to 2.*data\.validation_fr"
    ):
        describe([0, 1, 2], [0, 1, value])


def test_negative_training_label_is_refused():
    with pytest.raises(DataError, match=r"row 2 of train has label=-1.*data\.do_regression=false"):
        describe([0, -1, 1])


def test_negative_class_ids_are_names_where_the_settings_say_that_numbers_are_classes(caplog):
    with caplog.at_level(logging.INFO, logger="swaft"):
        task = describe([0, -1, 1], [1], do_regression=False)
    assert (task.label_names, task.label_ids) == (["-1", "0", "1"], {-1: 0, 0: 1, 1: 2})
    assert "label: whole numbers below 0 are names of 3 classes: -1, 0, 1" in caplog.text


@pytest.mark.parametrize("labels", [[0.5, math.nan], [1, None], ["a", None]])
def test_missing_label_is_refused(labels):
    with pytest.raises(DataError, match="row 2 of train has no label"):
        describe(labels)


def test_labels_of_different_kinds_are_refused():
    with pytest.raises(DataError, match="whole numbers in train but texts in validation"):
        describe([0, 1], ["a", "b"])
    with pytest.raises(DataError, match="column 'label' of train holds list values"):
        describe([[0], [1]])
    mixed = Dataset.from_dict({"text": ["a"] * 3, "label": [0, 1, "pos"]}, on_mixed_types="use_json")
    with pytest.raises(DataError, match="the int 0 in row 1, but the str 'pos' in row 3; write all as texts"):
        describe_task({"train": mixed}, DataConfig())


def test_a_single_class_is_refused():
    for labels in ([0, 0], ["a", "a"]):
        with pytest.raises(DataError, match="nothing to classify"):
            describe(labels)


def test_scores_written_as_texts_are_asked_about_and_taken_when_said():
    for texts in (["1.5", "2", "nan"], ["1,5", "2"]):
        with pytest.raises(DataError, match=r"numbers written as texts \('1.5', .*data\.do_regression=true"):
            describe(texts)
        assert describe(texts, do_regression=False).num_labels == len(texts)
    task = describe(["1.5", "2"], do_regression=True)
    assert (task.is_regression, task.num_labels) == (True, 1)
    for text in ("1,5", "nan", "good"):
        with pytest.raises(DataError, match=f"row 2 of train has label='{text}', which is not a score"):
            describe(["1.5", text], do_regression=True)


def test_truth_values_are_classes_of_that_name():
    assert describe([True, False]).label_names == ["False", "True"]
    assert describe([True, False], [True]).label_ids[True] == 1


@pytest.mark.parametrize("name", ["NA", "n/a", "NaN", "None", "null", "\\N"])
def test_a_class_spelled_as_a_missing_value_is_said(name, caplog):
    task = describe(["pos", "neg", name])
    assert str(task) == f"text -> label, 3 classes: {', '.join(sorted(['pos', 'neg', name]))}"
    assert f"label: {name!r} is a class; if it marks rows without a label, leave" in caplog.text


def test_one_class_in_two_unicode_forms_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="swaft"):
        describe(["caf\u00e9", "cafe\u0301", "tea"])
    assert "are two classes; write them alike if they are one" in caplog.text


def test_classes_that_differ_in_space_or_case_alone_are_said(caplog):
    assert describe(["pos", " Pos", "neg"]).num_labels == 3
    assert "label: ' Pos' and 'pos' are two classes" in caplog.text
