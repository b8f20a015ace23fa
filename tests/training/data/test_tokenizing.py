"""Rows of every family are tokenized in a way that scales: by small functions, in processes, once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dill
import pytest
from datasets import Dataset
from tiny_tokenizer import tiny_tokenizer

from swaft.errors import DataError
from swaft.training.data import causal_lm, classification, question_answering, seq2seq
from swaft.training.data.files import map_rows

pytestmark = pytest.mark.unit

NEEDLE = "a b c d needle"
TEXTS = [NEEDLE, "b", "c a", "d", "e e e"]


def classified(rows: Dataset, data: Any) -> Dataset:
    task = classification.describe_task({"train": rows}, data)
    return classification.tokenize(task.rows["train"], task, tiny_tokenizer(), data.max_seq_length)


def paired(rows: Dataset, data: Any) -> Dataset:
    columns = seq2seq.find_pairs({"train": rows}, data)
    pairs = seq2seq.read_pairs(columns.rows["train"], "train", columns)
    return seq2seq.tokenize_pairs(pairs, tiny_tokenizer(), data)


def continued(rows: Dataset, data: Any) -> Dataset:
    columns = causal_lm.find_columns({"train": rows}, data)
    return causal_lm.tokenize_rows(columns.rows, tiny_tokenizer(), columns, data)["train"]


def asked(rows: Dataset, data: Any) -> Dataset:
    [split] = question_answering.check_questions({"train": rows}).values()
    return question_answering.tokenize_questions(split, tiny_tokenizer(), data, training=True)


ANSWERS = [{"text": [text[0]], "answer_start": [0]} for text in TEXTS]
FAMILIES = {
    "classification": (classified, classification.DataConfig, {"text": TEXTS, "label": [0, 1, 0, 1, 0]}),
    "seq2seq": (paired, seq2seq.Seq2SeqDataConfig, {"source": TEXTS, "target": TEXTS}),
    "causal_lm": (continued, causal_lm.CausalDataConfig, {"prompt": TEXTS, "completion": TEXTS}),
    "question_answering": (
        asked,
        question_answering.QuestionAnsweringDataConfig,
        {"id": list("12345"), "question": ["b"] * 5, "context": TEXTS, "answers": ANSWERS},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> tuple[Callable[[Dataset, Any], Dataset], Any, dict[str, list]]:
    return FAMILIES[request.param]


def test_what_is_pickled_to_name_a_cache_holds_no_rows(family, monkeypatch):
    tokenize, settings, columns = family
    pickled, plain_map = [], Dataset.map

    def spied(self: Dataset, function: Callable, **options: Any) -> Dataset:
        pickled.append(dill.dumps(function, recurse=True))
        return plain_map(self, function, **options)

    monkeypatch.setattr(Dataset, "map", spied)
    tokenize(Dataset.from_dict(columns), settings())
    assert pickled
    assert not any(b"needle" in each for each in pickled)


def test_workers_change_neither_the_token_ids_nor_the_name_of_the_cache(family, tmp_path):
    tokenize, settings, columns = family
    Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    for rows in (Dataset.from_dict(columns), Dataset.from_parquet(str(tmp_path / "rows.parquet"))):
        alone = tokenize(rows, settings())
        together = tokenize(rows, settings(preprocessing_num_workers=2))
        assert together.to_list() == alone.to_list()
        assert together.cache_files == alone.cache_files


def test_one_rank_of_a_machine_tokenizes_and_the_others_read(tmp_path):
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "rows.parquet")
    rows, calls = Dataset.from_parquet(str(tmp_path / "rows.parquet")), tmp_path / "calls"

    def slow(texts: dict[str, list], indices: list[int]) -> dict[str, list]:
        with calls.open("a") as file:
            file.write("called\n")
        time.sleep(0.3)
        return {"length": list(map(len, texts["text"])), "idx": indices}

    with ThreadPoolExecutor() as ranks:
        found = list(ranks.map(lambda _: map_rows(rows, slow, None), range(3)))
    assert calls.read_text() == "called\n"
    assert {tuple(each["length"][:]) for each in found} == {tuple(map(len, TEXTS))}


def test_a_tokenizer_that_other_processes_cannot_receive_works_in_one_which_is_said(tmp_path, caplog):
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "rows.parquet")
    unpicklable = (word for word in TEXTS)

    def encode(texts: dict[str, list], indices: list[int]) -> dict[str, list]:
        return {"idx": indices if unpicklable else []}

    for rows in (Dataset.from_dict({"text": TEXTS}), Dataset.from_parquet(str(tmp_path / "rows.parquet"))):
        assert map_rows(rows, encode, None)["idx"][:] == [0, 1, 2, 3, 4]
        assert "one process" not in caplog.text
        assert map_rows(rows, encode, 2)["idx"][:] == [0, 1, 2, 3, 4]
        assert "one process tokenizes the rows" in caplog.text
        assert "cannot pickle" in caplog.text
        caplog.clear()


def test_an_error_of_a_worker_is_the_one_it_raised():
    def refuse(texts: dict[str, list], indices: list[int]) -> dict[str, list]:
        raise DataError("no such texts here")

    with pytest.raises(DataError, match="no such texts here"):
        map_rows(Dataset.from_dict({"text": TEXTS}), refuse, 2)


def test_what_was_cached_by_other_code_is_not_used(tmp_path, monkeypatch):
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "rows.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "rows.parquet"))

    def lengths(texts: dict[str, list], indices: list[int]) -> dict[str, list]:
        return {"length": [len(text) for text in texts["text"]]}

    before = map_rows(rows, lengths, None)
    assert map_rows(rows, lengths, None)._fingerprint == before._fingerprint
    monkeypatch.setattr("swaft.training.data.files.reading_code", lambda: "changed")
    assert map_rows(rows, lengths, None)._fingerprint != before._fingerprint
