"""What a model generates starts, ends and is padded as in training, whatever its files say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_texts import language_tokenizer, save_two_berts
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    CanineConfig,
    FunnelConfig,
    GemmaConfig,
    M2M100Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
)

from swaft.errors import ConfigError
from swaft.training.models.special_tokens import follow_tokenizer, one_length
from swaft.training.models.text_generation import generate_as_trained

pytestmark = pytest.mark.unit

BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
BART |= {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "vocab_size": 64}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64}


def tokenizer(**options: Any) -> Any:
    """mBART's, with <s> 0, <pad> 1, </s> 2 and <unk> 3."""
    made = language_tokenizer("mbart")
    for name, value in options.items():
        setattr(made, name, value)
    return made


def of_one_language() -> Any:
    """One with the same tokens that knows of no languages."""
    made = tokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **made.special_tokens_map)


def test_a_configuration_and_its_parts_take_the_ids_of_the_tokenizer():
    config = GemmaConfig(pad_token_id=9, bos_token_id=8, eos_token_id=[7, 6], vocab_size=64)
    made = tokenizer(padding_side="left")
    follow_tokenizer(config, made)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, [2, 7, 6])
    assert made.padding_side == "right"
    assert not hasattr(config, "sep_token_id")  # it knows no such token


def test_what_positions_are_counted_from_stays_unless_it_is_no_id():
    for kind in (RobertaConfig, M2M100Config):
        config = kind(pad_token_id=5, vocab_size=64)
        follow_tokenizer(config, tokenizer())
        assert config.pad_token_id == 5
        config.pad_token_id = -1
        follow_tokenizer(config, tokenizer())
        assert config.pad_token_id == 1


def test_a_model_that_reads_the_last_token_of_all_is_padded_on_the_left():
    made = tokenizer(padding_side="right")
    follow_tokenizer(XLNetConfig(vocab_size=64), made)
    assert made.padding_side == "left"


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (CanineConfig(downsampling_rate=4), 4),
        (FunnelConfig(block_sizes=[1, 1], vocab_size=64), 3),
        (FunnelConfig(block_sizes=[1, 1, 1], vocab_size=64), 5),
    ],
)
def test_a_model_that_shortens_its_rows_is_given_no_fewer_tokens_than_it_takes(config, least):
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "d_model": 8, "n_head": 2}
    for name, size in {**small, "d_head": 4, "d_inner": 8, "num_hidden_layers": 1}.items():
        if name in vars(config):
            setattr(config, name, size)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    one_row = torch.ones(1, least, dtype=torch.int64)
    assert model(one_row, one_row).logits.isfinite().all()
    assert one_length(config, least) == least
    with pytest.raises(RuntimeError):
        model(one_row[:, 1:], one_row[:, 1:])
    with pytest.raises(ConfigError, match=rf"max_seq_length is {least - 1}, .* expected .*={least} or more"):
        one_length(config, least - 1)


def test_a_model_generates_with_the_tokens_that_it_is_trained_with():
    ids = {"pad_token_id": 9, "bos_token_id": 8, "eos_token_id": 7, "decoder_start_token_id": 6}
    model = BartForConditionalGeneration(BartConfig(**BART, **ids))
    generation = model.generation_config
    generation.eos_token_id, generation.forced_eos_token_id, generation.forced_bos_token_id = [7, 5], 7, 8
    generation.decoder_start_token_id = 4
    follow_tokenizer(model.config, tokenizer())
    generate_as_trained(model, of_one_language())
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (1, 0, [2, 7, 5])
    assert generation.forced_eos_token_id == 2
    assert generation.forced_bos_token_id is None  # targets begin with no such token
    assert generation.decoder_start_token_id == 6  # as its own shift of the labels has it


def test_a_start_that_only_the_generation_settings_know_is_trained_with():
    model = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=None))
    model.generation_config.decoder_start_token_id = 5
    generate_as_trained(model, of_one_language())
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 5
    without = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=None))
    without.generation_config.decoder_start_token_id = None
    generate_as_trained(without, of_one_language())
    assert without.config.decoder_start_token_id is None


def test_a_decoder_made_of_a_bert_ends_with_the_separator_that_its_targets_end_with(tmp_path):
    folder = save_two_berts(tmp_path, decoder_start_token_id=2)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id is None
    made = AutoTokenizer.from_pretrained(folder)
    follow_tokenizer(model.config, made)
    generate_as_trained(model, made)
    assert model.generation_config.eos_token_id == 3
