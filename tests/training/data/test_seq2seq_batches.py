"""Pairs of texts become token ids, padded batches and batches of like length."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_tokenizer import tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from swaft.training.data.seq2seq import Seq2SeqDataConfig, report_lengths, tokenize_pairs
from swaft.training.data.texts import Collator

pytestmark = pytest.mark.unit

PAIRS = Dataset.from_dict(
    {
        "source": ["a b c", "d", "e e e e e e"],
        "target": ["b", "c d e a", "a a"],
        "references": [["b"], ["c d e a", "x"], ["a a"]],
    }
)


def tokenized(max_source_length: int = 16, max_target_length: int = 16, **options) -> Dataset:
    lengths = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    return tokenize_pairs(PAIRS, tiny_tokenizer(), Seq2SeqDataConfig(**lengths, **options))


def test_pairs_become_ids_labels_row_numbers_and_lengths():
    found = tokenized()
    assert found["input_ids"][:] == [[2, 4, 5, 6, 3], [2, 7, 3], [2, 8, 8, 8, 8, 8, 8, 3]]
    assert found["labels"][:] == [[2, 5, 3], [2, 6, 7, 8, 4, 3], [2, 4, 4, 3]]
    assert found["idx"][:] == [0, 1, 2]
    assert found["source_length"][:] == [5, 3, 8]
    assert found["target_length"][:] == [3, 6, 4]
    assert set(found.column_names) == {
        "input_ids", "attention_mask", "token_type_ids", "labels", "idx", "source_length", "target_length",
    }  # fmt: skip


def test_long_texts_are_cut_and_their_lengths_kept():
    found = tokenized(5, 4)
    assert found["input_ids"][:] == [[2, 4, 5, 6, 3], [2, 7, 3], [2, 8, 8, 8, 3]]
    assert found["attention_mask"][:] == [[1] * 5, [1] * 3, [1] * 5]
    assert found["labels"][:] == [[2, 5, 3], [2, 6, 7, 3], [2, 4, 4, 3]]
    assert found["source_length"][:] == [5, 3, 8]
    assert found["target_length"][:] == [3, 6, 4]


def test_prefix_stands_before_every_source():
    assert tokenized(source_prefix="b d ")["input_ids"][1] == [2, 5, 7, 7, 3]


class TwoSided(PreTrainedTokenizerFast):
    """Starts targets with [SEP]."""

    def _switch_to_input_mode(self):
        self._tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))

    def _switch_to_target_mode(self):
        self._tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[SEP]", 3))


def test_targets_are_tokenized_as_targets():
    plain = tiny_tokenizer()
    tokenizer = TwoSided(tokenizer_object=plain._tokenizer, model_max_length=16, pad_token="[PAD]")
    found = tokenize_pairs(PAIRS, tokenizer, Seq2SeqDataConfig(max_source_length=16, max_target_length=4))
    assert found["input_ids"][0] == [2, 4, 5, 6, 3]
    assert found["labels"][:] == [[3, 5, 3], [3, 6, 7, 3], [3, 4, 4, 3]]


def test_targets_end_also_with_a_tokenizer_that_ends_no_text():
    tokenizer = tiny_tokenizer(eos_token="[SEP]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 2)]
    )
    found = tokenize_pairs(PAIRS, tokenizer, Seq2SeqDataConfig(max_target_length=4))
    assert found["labels"][:] == [[5, 3], [6, 7, 8, 3], [4, 4, 3]]
    assert found["target_length"][:] == [2, 5, 3]
    assert found["input_ids"][1] == [2, 7]


def test_lengths_and_the_share_of_texts_that_are_cut_are_logged(caplog):
    train = Dataset.from_dict({"source_length": [10] * 19 + [30], "target_length": [20] * 20})
    with caplog.at_level(logging.INFO, logger="swaft"):
        report_lengths(train, Seq2SeqDataConfig(max_source_length=20, max_target_length=20))
    assert caplog.messages == [
        f"sources: 11 tokens on average, 95 % up to {np.percentile([10] * 19 + [30], 95):.0f}, longest 30; "
        "5.0 % are cut to 20",
        "targets: 20 tokens on average, 95 % up to 20, longest 20; 0.0 % are cut to 20",
    ]


def test_batch_is_padded_and_labels_are_with_minus_100():
    rows = tokenized()
    batch = Collator(tiny_tokenizer())([rows[0], rows[1]])
    assert type(batch) is dict
    assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 3], [2, 7, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[2, 5, 3, -100, -100, -100], [2, 6, 7, 8, 4, 3]]
    assert batch["idx"].tolist() == [0, 1]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "idx"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_sources_of_one_length_leave_targets_as_they_are():
    rows = tokenized()
    batch = Collator(tiny_tokenizer(), 7)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 3, 0, 0], [2, 7, 3, 0, 0, 0, 0]]
    assert batch["labels"].shape == (2, 6)


def test_sources_are_padded_on_the_side_of_the_tokenizer():
    rows = tokenized()
    batch = Collator(tiny_tokenizer(padding_side="left"))([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 3], [0, 0, 2, 7, 3]]
    assert batch["labels"][0].tolist() == [2, 5, 3, -100, -100, -100]
