"""Rows of every family are tokenized in a way that scales: by small functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dill
import pytest
from datasets import Dataset
from tiny_tokenizer import tiny_tokenizer

from swaft.training.data import causal_lm, classification, question_answering, seq2seq

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
    return causal_lm.tokenize_rows(columns.rows["train"], tiny_tokenizer(), columns, data)


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
