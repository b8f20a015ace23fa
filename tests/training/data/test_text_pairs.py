"""Sources, targets and references are found, and rows that cannot be used are named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset

from swaft.errors import DataError
from swaft.training.data.seq2seq import PairColumns, Seq2SeqDataConfig, find_pairs, read_pairs

pytestmark = pytest.mark.unit


def rows(**columns: list) -> Dataset:
    return Dataset.from_dict(columns)


def find(train: Dataset, validation: Dataset | None = None, **settings: Any) -> PairColumns:
    splits = {"train": train} | ({} if validation is None else {"validation": validation})
    return find_pairs(splits, Seq2SeqDataConfig(**settings))


E2E = rows(
    meaning_representation=["name[A]", "name[B]", "name[A]", "name[A]"],
    human_reference=["A is.", "B is.", "There is A.", "A is."],
)
TRANSLATIONS = rows(translation=[{"en": "Go.", "fr": "Va !"}, {"en": "Go.", "fr": "Allez !"}])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("document", "summary"), ("article", "highlights"), ("text", "summary"), ("dialogue", "summary"),
        ("meaning_representation", "human_reference"), ("source", "target"),
    ],
)  # fmt: skip
def test_usual_columns_are_found_by_name(source, target):
    train = rows(**{target: ["a"], source: ["b"], "more": ["c"]})
    assert find(train) == PairColumns(source, target)


def test_named_columns_win_over_usual_ones():
    train = rows(document=["a"], summary=["b"], head=["c"])
    columns = find(train, source_column="document", target_column="head")
    assert columns == PairColumns("document", "head")


def test_missing_columns_are_named_with_those_there_are():
    with pytest.raises(DataError, match=r"data\.target_column: .*'sumary'.*Did you mean 'summary'"):
        find(rows(text=["a"], summary=["b"]), source_column="text", target_column="sumary")
    with pytest.raises(DataError, match=r"the columns are body, head; set data\.source_column"):
        find(rows(body=["a"], head=["b"]))
    with pytest.raises(DataError, match="the validation split has no column 'summary'"):
        find(rows(text=["a"], summary=["b"]), rows(text=["a"]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has nothing in column 'summary'; expected text"),
        (" \n", "has an empty text in column 'summary'"),
        ("\ufeff\u200b\xa0", "has an empty text in column 'summary'"),
    ],
)
def test_text_that_is_none_is_named(text, said):
    with pytest.raises(DataError, match=f"row 2 of validation {said}"):
        find(rows(text=["a"], summary=["b"]), rows(text=["a", "b"], summary=["b", text]))


def test_bad_rows_are_left_out_when_asked():
    split = rows(
        text=["a", None, "c", "d"],
        summary=["b", "b", "\n", "b"],
        references=[["b"], ["b"], ["b"], []],
    )
    found = find(split, skip_bad_rows=True)
    assert found.rows["train"].to_list() == [split[0]]
    split = rows(translation=[{"en": "Go.", "fr": None}, {"en": "Go.", "fr": "Va !"}, None])
    found = find(split, source_lang="en", target_lang="fr", skip_bad_rows=True)
    assert found.rows["train"].to_list() == [split[1]]


def test_rows_outside_train_that_share_a_source_become_one_with_all_references(caplog):
    columns = find(E2E, E2E)
    with caplog.at_level(logging.INFO, logger="swaft"):
        found = read_pairs(E2E, "validation", columns)
    assert found.to_list() == [
        {"source": "name[A]", "target": "A is.", "references": ["A is.", "There is A."]},
        {"source": "name[B]", "target": "B is.", "references": ["B is."]},
    ]
    assert "4 rows of validation share 2 sources" in caplog.text


def test_translations_written_as_texts_are_said_to_be_texts():
    texts = rows(translation=['{"en": "Go.", "fr": "Va !"}'])
    with pytest.raises(
        DataError, match="'translation' holds no translations: expected an object with a text"
    ):
        find(texts, source_lang="en", target_lang="fr")
    with pytest.raises(DataError, match=r"row 1 of validation has the text .* expected a text for each lang"):
        find(TRANSLATIONS, texts, source_lang="en", target_lang="fr", skip_bad_rows=True)


def test_validation_rows_drawn_from_train_that_share_its_sources_are_counted(caplog):
    find(E2E, E2E.select([1, 2]))
    assert "share their source with training rows" not in caplog.text
    find(E2E.select([0, 2]), E2E.select([1, 3]), validation_fraction=0.5)
    assert "1 of 2 validation rows share their source with training rows" in caplog.text
    languages = {"source_lang": "en", "target_lang": "fr", "validation_fraction": 0.5}
    find(TRANSLATIONS.select([0]), TRANSLATIONS.select([1]), **languages)
    assert "1 of 1 validation rows share their source with training rows" in caplog.text


def test_training_rows_stay_single():
    found = read_pairs(E2E, "train", find(E2E))
    assert found["target"][:] == E2E["human_reference"][:]
    assert found["references"][:] == [[target] for target in E2E["human_reference"]]


def test_list_of_references_is_taken_as_it_is():
    split = rows(
        document=["a", "a"], summary=["one", "two"], references=[["one", "uno"], ["two"]], id=["1", "2"]
    )
    found = read_pairs(split, "test", find(split))
    assert found["references"][:] == [["one", "uno"], ["two"]]
    assert found["target"][:] == ["one", "two"]


@pytest.mark.parametrize("references", [[], ["one", ""], None])
def test_list_without_a_usable_reference_is_named(references):
    split = rows(document=["a", "b"], summary=["one", "two"], references=[["one"], references])
    with pytest.raises(DataError, match=r"row 2 of train has .* in column 'references'"):
        find(split)


def test_translation_goes_from_one_language_to_the_other_and_keeps_its_rows():
    columns = find(TRANSLATIONS, source_lang="en", target_lang="fr")
    assert read_pairs(TRANSLATIONS, "test", columns).to_list() == [
        {"source": "Go.", "target": "Va !", "references": ["Va !"]},
        {"source": "Go.", "target": "Allez !", "references": ["Allez !"]},
    ]
    back = find(TRANSLATIONS, source_lang="fr", target_lang="en")
    assert read_pairs(TRANSLATIONS, "train", back)["source"][:] == ["Va !", "Allez !"]


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (None, None, r"data\.source_lang is None; the languages are en, fr"),
        ("en", "de", r"data\.target_lang is de; the languages are en, fr"),
        ("en", "en", "both en"),
    ],
)
def test_languages_have_to_be_named(source, target, said):
    with pytest.raises(DataError, match=said):
        find(TRANSLATIONS, source_lang=source, target_lang=target)


def test_the_code_of_a_model_finds_the_language_before_its_underscore():
    assert find(TRANSLATIONS, source_lang="en_XX", target_lang="fr_XX") == PairColumns(
        "translation", "translation", "en", "fr"
    )


def test_columns_may_name_languages_where_the_model_calls_them_otherwise():
    found = find(
        TRANSLATIONS,
        source_column="en",
        target_column="fr",
        source_lang="eng_Latn",
        target_lang="fra_Latn",
    )
    assert found == PairColumns("translation", "translation", "en", "fr")


def test_languages_beside_columns_are_left_to_the_tokenizer():
    split = rows(text=["a"], summary=["b"])
    assert find(split, source_lang="en_XX", target_lang="en_XX") == PairColumns("text", "summary")


def test_translation_without_a_text_is_named():
    split = rows(translation=[{"en": "Go.", "fr": "Va !"}, {"en": "Go.", "fr": None}])
    with pytest.raises(DataError, match="row 2 of train has None as its text in 'fr'"):
        find(split, source_lang="en", target_lang="fr")


def test_the_languages_of_a_column_are_those_of_its_first_row_that_has_any():
    train = rows(translation=[None, {"en": "Go.", "fr": "Va !"}])
    found = find(train, source_lang="en", target_lang="fr", skip_bad_rows=True)
    assert (found.source_lang, len(found.rows["train"])) == ("en", 1)
    texts = rows(translation=["Va !"], text=["Go."])
    with pytest.raises(DataError, match=r"the columns are translation, text; set data\.source_column"):
        find(texts, source_lang="en", target_lang="fr")


def test_one_column_is_not_both_source_and_target():
    with pytest.raises(DataError, match=r"data\.source_column and data\.target_column are both text"):
        find(rows(text=["a"], summary=["b"]), source_column="text", target_column="text")
