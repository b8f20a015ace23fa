"""What a text spells is text: only what the tokenizer adds is special."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    AddedToken,
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    EsmTokenizer,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

from swaft.errors import DataError
from swaft.training.data.question_answering import QuestionAnsweringDataConfig as Data
from swaft.training.data.question_answering import tokenize_questions
from swaft.training.data.seq2seq import Seq2SeqDataConfig, tokenize_pairs
from swaft.training.data.texts import (
    Collator,
    encode,
    read_as_text,
    refuse_split_settings,
    report_special_tokens,
)

pytestmark = pytest.mark.unit

PIECES = ["▁", "▁w", "w", "1", "2", "s"]


def words() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def unigram() -> T5Tokenizer:
    """T5's, whose special tokens are pieces of its vocabulary that beat all others."""
    special = ["<pad>", "</s>", "<unk>"]
    return T5Tokenizer(vocab=[*((token, 0.0) for token in special), *((piece, -3.0) for piece in PIECES)])


def word_pieces() -> BertTokenizer:
    kept = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "sep", "a", "b"]
    return BertTokenizer(vocab={token: index for index, token in enumerate(kept)})


def bytes_with_a_word() -> ByT5Tokenizer:
    """A slow one to which a word was added."""
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<url>"])
    return tokenizer


def amino_acids(tmp_path) -> EsmTokenizer:
    """A slow one that knows nothing but words added to it."""
    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"LAGV", "<mask>"]))
    return EsmTokenizer(str(tmp_path / "vocab.txt"))


def tokens(tokenizer, *texts: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(encode(tokenizer, *([text] for text in texts))["input_ids"][0])


@pytest.mark.parametrize(
    ("make", "text", "parsed", "read"),
    [
        (words, "a [SEP] b", "[CLS] a [SEP] b [SEP]", "[CLS] a [UNK] [UNK] [UNK] b [SEP]"),
        (unigram, "w1 </s> w2", "▁w 1 </s> ▁w 2 </s>", "▁w 1 ▁ <unk> ▁w 2 </s>"),
        (unigram, "w1 <extra_id_0>", "▁w 1 <extra_id_0> </s>", "▁w 1 ▁ <unk> </s>"),
        (word_pieces, "a [SEP] b", "[CLS] a [SEP] b [SEP]", "[CLS] a [ sep ] b [SEP]"),
        (ByT5Tokenizer, "a</s>", "a </s>", "a < / s > </s>"),
        (bytes_with_a_word, "</s><url>a", "</s> <url> a </s>", "<unk> <url> a </s>"),
        (bytes_with_a_word, "</s><url></s>", "</s> <url> </s>", "<unk> <url> </s>"),
    ],
)
def test_a_special_token_in_a_text_is_text_to_fast_and_slow_tokenizers(make, text, parsed, read):
    tokenizer = make()
    assert tokens(tokenizer, text) == parsed.split()
    read_as_text(tokenizer, True)
    assert tokens(tokenizer, text) == read.split()
    read_as_text(tokenizer, False)
    assert tokens(tokenizer, text) == parsed.split()


def test_a_tokenizer_of_nothing_but_added_words_keeps_them(tmp_path):
    tokenizer = amino_acids(tmp_path)
    read_as_text(tokenizer, True)
    assert tokens(tokenizer, "LAG<eos>V") == ["<cls>", "L", "A", "G", "<unk>", "V", "<eos>"]


def test_what_was_set_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = word_pieces()
    read_as_text(tokenizer, True)
    tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("a [SEP] b").input_ids
    assert ids == encode(tokenizer, ["a [SEP] b"])["input_ids"][0]


def test_a_word_to_pad_with_is_trained_as_the_word_that_a_saved_tokenizer_reads(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "b"
    read_as_text(tokenizer, True)
    assert tokens(tokenizer, "a b b") == ["[CLS]", "a", "b", "b", "[SEP]"]
    tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("a b b").input_ids
    assert ids == encode(tokenizer, ["a b b"])["input_ids"][0]
    tokenizer.eos_token = "b"
    assert tokens(tokenizer, "a b b") == ["[CLS]", "a", "[UNK]", "[UNK]", "[SEP]"]


def test_a_word_that_is_a_special_token_needs_one_for_unknown_words():
    tokenizer = unigram()
    tokenizer.unk_token = None
    read_as_text(tokenizer, True)
    with pytest.raises(DataError, match=r"a text spells </s>.*data\.split_special_tokens=false"):
        encode(tokenizer, ["w1", "w2 </s>"])
    rows = Dataset.from_dict({"text": ["w1", "w1 </s>"]})
    with pytest.raises(DataError, match=r"a text spells </s>"):  # known before any row is tokenized
        report_special_tokens({"train": rows}, ["text"], tokenizer)


@pytest.mark.parametrize(
    ("make", "text"), [(words, "a [SEP] b"), (unigram, "w1 <extra_id_0>"), (bytes_with_a_word, "</s>a")]
)
def test_a_special_token_in_a_setting_is_refused_where_it_would_be_text(make, text):
    tokenizer, data = make(), Seq2SeqDataConfig(source_prefix=text)
    refuse_split_settings(tokenizer, data, "source_prefix")
    read_as_text(tokenizer, True)
    with pytest.raises(DataError, match=r"data\.source_prefix is .*set data\.split_special_tokens=false"):
        refuse_split_settings(tokenizer, data, "source_prefix")
    refuse_split_settings(tokenizer, Seq2SeqDataConfig(source_prefix="w1 a: <url>"), "source_prefix")


def test_an_answer_beside_a_spelled_token_keeps_its_characters():
    tokenizer = word_pieces()
    read_as_text(tokenizer, True)
    context = "a [SEP] b a"
    row = {"id": ["1"], "question": ["a [CLS] b"], "context": [context]}
    rows = Dataset.from_dict(row | {"answers": [{"text": ["[SEP] b"], "answer_start": [2]}]})
    window = tokenize_questions(rows, tokenizer, Data(max_seq_length=32, doc_stride=4), training=False)[0]
    ids, first, last = window["input_ids"], window["start_positions"], window["end_positions"]
    assert tokenizer.convert_ids_to_tokens(ids[first : last + 1]) == ["[", "sep", "]", "b"]
    assert ids.count(tokenizer.sep_token_id) == 2
    assert window["cls_position"] == 0
    places = [context[start:end] for start, end in window["offsets"] if start >= 0]
    assert places == ["a", "[", "SEP", "]", "b", "a"]


def test_sources_and_targets_are_text_too():
    tokenizer = unigram()
    read_as_text(tokenizer, True)
    rows = Dataset.from_dict({"source": ["w1 </s> w2"], "target": ["</s> w1"]})
    data = Seq2SeqDataConfig(max_source_length=16, max_target_length=16)
    batch = Collator(tokenizer)([tokenize_pairs(rows, tokenizer, data)[0]])
    assert (batch["input_ids"] == tokenizer.eos_token_id).sum(dim=1).tolist() == [1]
    assert (batch["labels"] == tokenizer.eos_token_id).sum(dim=1).tolist() == [1]


def test_a_token_that_is_special_as_an_added_token_only_is_reported_and_read_as_text(caplog):
    """As most tokens of chat templates are: Mistral's [INST], Llama's <|eot_id|>."""
    tokenizer = words()
    tokenizer.add_tokens([AddedToken(each, special=True) for each in ("<s>", "<s>1", "a")])
    assert {"<s>", "<s>1", "a"}.isdisjoint(tokenizer.all_special_tokens)
    read_as_text(tokenizer, True)
    assert tokens(tokenizer, "b <s>1 a") == [
        "[CLS]",
        "b",
        "[UNK]",
        "[UNK]",
        "[UNK]",
        "[UNK]",
        "[UNK]",
        "[SEP]",
    ]
    rows = Dataset.from_dict({"text": ["b", "<s>1"]})
    report_special_tokens({"train": rows}, ["text"], tokenizer)
    assert "1 rows of train spell special tokens (row 2: <s>1), which are text" in caplog.text


@pytest.mark.parametrize(
    ("split", "said"), [(True, "are text"), (False, "have their special meaning")], ids=str
)
def test_rows_that_spell_special_tokens_are_counted_and_the_setting_is_named(split, said, caplog):
    tokenizer = word_pieces()
    read_as_text(tokenizer, split)
    rows = Dataset.from_dict({"one": ["a", "b", "[MASK]"], "two": ["b", "a [SEP]", "a"]})
    with caplog.at_level(logging.WARNING):
        report_special_tokens({"train": rows, "test": rows.select([0])}, ["one", "two"], tokenizer)
    expected = f"2 rows of train spell special tokens (row 2: [SEP]), which {said}"
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [expected]
    assert f"data.split_special_tokens={str(not split).lower()}" in caplog.text
