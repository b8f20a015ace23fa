"""Rows become token ids and padded batches."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from tiny_tokenizer import tiny_tokenizer
from tokenizers import normalizers

from swaft.errors import DataError
from swaft.training.data.classification import DataConfig, describe_task, report_lengths, tokenize
from swaft.training.data.texts import Collator, refuse_rows_without_tokens

pytestmark = pytest.mark.unit

SINGLE = Dataset.from_dict({"text": ["a b c", "d", "e e"], "label": ["no", "yes", "no"], "idx": [7, 8, 9]})
PAIRS = Dataset.from_dict({"sentence1": ["a b", "c"], "sentence2": ["d", "e e e e"], "label": [0.5, 3.0]})


def tokenized(rows: Dataset, max_seq_length: int = 16) -> Dataset:
    return tokenize(rows, describe_task({"train": rows}, DataConfig()), tiny_tokenizer(), max_seq_length)


def test_rows_become_ids_labels_and_row_numbers_and_nothing_else():
    found = tokenized(SINGLE)
    assert found["input_ids"][:] == [[2, 4, 5, 6, 3], [2, 7, 3], [2, 8, 8, 3]]
    assert found["labels"][:] == [0, 1, 0]
    assert found["idx"][:] == [0, 1, 2]
    assert set(found.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels", "idx"}


def test_pair_is_one_input_and_a_score_stays_a_fraction():
    found = tokenized(PAIRS)
    assert found["input_ids"][:] == [[2, 4, 5, 3, 7, 3], [2, 6, 3, 8, 8, 8, 8, 3]]
    assert found["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert found["labels"][:] == [0.5, 3.0]


def test_longer_text_of_a_pair_is_cut():
    assert tokenized(PAIRS, 6)["input_ids"][:] == [[2, 4, 5, 3, 7, 3], [2, 6, 3, 8, 8, 3]]


def test_how_many_training_rows_may_be_cut_is_told(caplog):
    with caplog.at_level(logging.INFO, logger="swaft"):
        report_lengths(tokenized(PAIRS, 8), 8)
    assert (
        "rows: 7 tokens on average; 50.0 % have data.max_seq_length=8 tokens (longer ones are cut)"
        in caplog.text
    )


def test_selected_rows_are_numbered_from_zero():
    assert tokenized(SINGLE.select([1, 2]))["idx"][:] == [0, 1]


def test_batch_is_padded_to_its_longest_row():
    rows = tokenized(SINGLE)
    batch = Collator(tiny_tokenizer())([rows[1], rows[2]])
    assert type(batch) is dict
    assert batch["input_ids"].tolist() == [[2, 7, 3, 0], [2, 8, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["idx"].tolist() == [1, 2]
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)


def test_scores_are_fp32():
    rows = tokenized(PAIRS)
    labels = Collator(tiny_tokenizer())([rows[0], rows[1]])["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [0.5, 3.0]


def test_tokenizer_without_padding_token_is_refused():
    with pytest.raises(DataError, match="no padding token"):
        Collator(tiny_tokenizer(pad_token=None))


def test_an_empty_text_is_refused_where_the_tokenizer_makes_no_token_of_it():
    rows = Dataset.from_dict({"text": ["a", " "], "label": [0, 1]})
    task = describe_task({"train": rows}, DataConfig())
    refuse_rows_without_tokens(task.rows, task.text_columns, tiny_tokenizer())
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match=r"row 2 of train has an empty text.*data\.skip_bad_rows=true"):
        refuse_rows_without_tokens(task.rows, task.text_columns, bare)
    bare.backend_tokenizer.normalizer = normalizers.Replace("é", "")  # one that knows no such letter
    strange = Dataset.from_dict({"one": ["a", "é", "é"], "two": ["é", "a", "éé"]})
    with pytest.raises(DataError, match=r"row 3 of test has the text 'é', which .* turns into no token"):
        refuse_rows_without_tokens({"test": strange}, ("one", "two"), bare)
