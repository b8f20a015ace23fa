"""Models of many languages are told which one they read and which one they write."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer, PreTrainedTokenizerFast

from swaft.errors import ConfigError
from swaft.training.data.seq2seq import PairColumns, Seq2SeqDataConfig, tokenize_pairs
from swaft.training.models.text_generation import (
    generate_as_trained,
    language_codes,
    require_target_language,
    set_languages,
)

pytestmark = pytest.mark.unit

COLUMNS = PairColumns("source", "target")
TRANSLATIONS = PairColumns("translation", "translation", "en", "fr")
LETTERS = ["<s>", "<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz"]


def nllb(**options) -> NllbTokenizer:
    return NllbTokenizer(vocab={token: index for index, token in enumerate(LETTERS)}, merges=[], **options)


def told(tokenizer, source: str | None, target: str | None, columns: PairColumns = COLUMNS, **data):
    set_languages(tokenizer, Seq2SeqDataConfig(source_lang=source, target_lang=target, **data), columns)
    return tokenizer


def m2m100(**entries) -> M2M100ForConditionalGeneration:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    return M2M100ForConditionalGeneration(
        M2M100Config(vocab_size=300, d_model=8, **sizes, **heads, **entries)
    )


def test_texts_carry_the_codes_of_their_languages_even_when_cut():
    tokenizer = told(nllb(), "eng_Latn", "fra_Latn")
    pairs = Dataset.from_dict({"source": ["a cat"] * 2, "target": ["chat", "un chat noir et blanc"]})
    data = Seq2SeqDataConfig(max_source_length=16, max_target_length=8)
    rows: Any = tokenize_pairs(pairs, tokenizer, data)
    english, french = tokenizer.convert_tokens_to_ids(["eng_Latn", "fra_Latn"])
    assert {ids[0] for ids in rows["input_ids"]} == {english}
    assert [(ids[0], ids[-1]) for ids in rows["labels"]] == [(french, tokenizer.eos_token_id)] * 2
    assert rows["target_length"][1] > len(rows["labels"][1]) == 8


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("en", "fra_Latn", "data.source_lang: NllbTokenizer has no language 'en'; did you mean eng_Latn?"),
        ("eng_Latn", "fra_Ltn", "data.target_lang: .* did you mean fra_Latn or"),
        (
            None,
            None,
            "data.source_lang: NllbTokenizer has no language None; expected one of ace_Arab, .*202 in all",
        ),
    ],
)
def test_a_language_that_the_tokenizer_does_not_know_is_named_with_the_nearest(source, target, said):
    with pytest.raises(ConfigError, match=said):
        told(nllb(), source, target)


def test_all_languages_that_are_wrong_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        told(nllb(), "en", "fr")
    assert len(caught.value.problems) == 2


class OneLanguage(PreTrainedTokenizerFast):
    """Knows nothing of languages."""


def one_language() -> OneLanguage:
    return OneLanguage(tokenizer_object=nllb()._tokenizer, pad_token="<pad>")


@pytest.mark.parametrize(
    ("columns", "data"), [(COLUMNS, {}), (TRANSLATIONS, {"source_column": "en", "target_column": "fr"})]
)
def test_languages_that_nothing_uses_are_refused(columns, data):
    with pytest.raises(ConfigError, match=r"data\.source_lang: en is used by nothing"):
        told(one_language(), "en", "fr", columns, **data)


def test_languages_that_choose_the_texts_need_no_code():
    tokenizer = told(one_language(), "en", "fr", TRANSLATIONS)
    assert not hasattr(tokenizer, "src_lang")
    model, first = m2m100(), tokenizer(text_target="a").input_ids[0]
    model.generation_config.forced_bos_token_id = first
    generate_as_trained(model, tokenizer)
    assert model.generation_config.forced_bos_token_id == first


def test_codes_may_be_spelt_otherwise_than_their_tokens():
    ids = {"en": 5, "fr": 6, "xx": 0}
    tokenizer = SimpleNamespace(  # as M2M100's, which needs sentencepiece
        lang_code_to_id=dict.fromkeys(ids), get_lang_id=ids.get, convert_tokens_to_ids=None, unk_token_id=0
    )
    assert language_codes(tokenizer) == {"en": 5, "fr": 6}


def test_the_language_of_an_earlier_fine_tuning_is_replaced():
    tokenizer, model = told(nllb(), "eng_Latn", "fra_Latn"), m2m100()
    model.generation_config.forced_bos_token_id = 7
    generate_as_trained(model, tokenizer)
    french = tokenizer.convert_tokens_to_ids("fra_Latn")
    assert model.generation_config.forced_bos_token_id == french
    assert model.generation_config.decoder_start_token_id == model.config.decoder_start_token_id == 2


def test_a_code_that_neither_labels_nor_decoder_begin_with_is_refused():
    tokenizer = told(nllb(legacy_behaviour=True), "eng_Latn", "fra_Latn")
    with pytest.raises(ConfigError, match=r"nothing says which language to write; .*legacy_behaviour"):
        require_target_language(m2m100().config, tokenizer)
