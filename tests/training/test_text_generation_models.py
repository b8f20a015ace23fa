from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import (
    EncoderDecoderConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from swaft.errors import ConfigError
from swaft.training.data.causal_lm import CausalConfig, CausalDataConfig
from swaft.training.data.seq2seq import Seq2SeqConfig, Seq2SeqModelConfig, Seq2SeqTrainConfig
from swaft.training.models.text_generation import (
    check_new_model,
    decoder_config,
    encoder_decoder_config,
    load_text_model,
    new_tokenizer,
    train_tokenizer,
)

pytestmark = pytest.mark.unit

TEXTS = ["the cat sat on the mat", "le chat était là", "a dog, a bird and a horse"] * 4
TINY = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


def new_model(accelerator, seed: int = 0, **entries):
    section = Seq2SeqModelConfig(config=TINY | entries, vocab_size=300)
    tokenizer = new_tokenizer(section, accelerator, lambda: TEXTS)
    config = encoder_decoder_config(section)
    settings = Seq2SeqConfig(model=section, train=Seq2SeqTrainConfig(output_dir="unused", seed=seed))
    return load_text_model(settings, config, tokenizer), tokenizer


SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 300,
}
BERT = SMALL | {"model_type": "bert"}
XLNET = {"model_type": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 300}
BLOOM = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 300}


@pytest.mark.parametrize(
    ("entries", "packs", "reason"),
    [
        (SMALL | {"model_type": "llama"}, True, None),
        (SMALL | {"model_type": "bert", "is_decoder": True}, False, None),
        (BLOOM, False, None),
        (BLOOM, True, "model.config: packed rows of bloom see each other; set data.packing=false"),
        (XLNET, False, "model.config: tokens of xlnet see later ones"),
    ],
)
def test_a_decoder_whose_tokens_see_what_they_should_not_is_refused(entries, packs, reason):
    section = Seq2SeqModelConfig(config=entries, vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(TEXTS, 300), pad_token="<pad>", eos_token="</s>"
    )
    train, data = Seq2SeqTrainConfig(output_dir="unused"), CausalDataConfig(packing=packs)
    config = CausalConfig(model=section, train=train, data=data)
    with nullcontext() if reason is None else pytest.raises(ConfigError, match=reason):
        model = load_text_model(config, decoder_config(section), tokenizer)
        assert model.training
        end = tokenizer.eos_token_id
        assert model.generation_config.eos_token_id == end
        model = load_text_model(config, decoder_config(section), tokenizer, ends={end, 7})
        assert model.generation_config.eos_token_id == [end, 7]
        assert tokenizer.padding_side == tokenizer.init_kwargs["padding_side"] == "left"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, None),
        ({"temperature": 0.9, "do_sample": False}, r"generation_config\.json of .*model .*`temperature`"),
        (
            {"temperature": 0.9, "length_penalty": 2.0},
            r"generation_config\.json of .*model .*`length_penalty`",
        ),
    ],
)
def test_generation_settings_that_could_not_be_saved_are_mended_or_refused_before_training(
    settings, reason, tmp_path
):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(TEXTS, 300), pad_token="<pad>", eos_token="</s>"
    )
    folder, config = tmp_path / "model", SMALL | {"num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    section = Seq2SeqModelConfig(model_name_or_path=str(folder))
    config = CausalConfig(model=section, train=Seq2SeqTrainConfig(output_dir="unused"))
    adapted = replace(config, model=replace(section, use_peft=True))  # such a folder takes any
    load_text_model(adapted, decoder_config(section), tokenizer)
    with nullcontext() if reason is None else pytest.raises(ConfigError, match=reason):
        model = load_text_model(config, decoder_config(section), tokenizer)
        model.save_pretrained(tmp_path / "final")
        kept = GenerationConfig.from_pretrained(tmp_path / "final")
        assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.9, 0.6)
        # As it came: others generate with it.
        assert LlamaConfig.from_pretrained(tmp_path / "final").use_cache


@pytest.mark.parametrize("entries", [{"model_type": "bert"}, {"model_type": "xlm", "causal": True}])
def test_a_model_that_learns_no_next_token_is_no_decoder(entries):
    with pytest.raises(ConfigError, match=f"{entries['model_type']} is not a decoder that continues a text"):
        decoder_config(Seq2SeqModelConfig(config=entries))


@pytest.mark.parametrize("pad", ["</s>", "<pad>"])
def test_the_embedding_of_the_end_is_learnt_where_it_pads_too(pad):
    section = Seq2SeqModelConfig(config=SMALL | {"model_type": "llama"}, vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(TEXTS, 300), pad_token=pad, eos_token="</s>"
    )
    config = CausalConfig(model=section, train=Seq2SeqTrainConfig(output_dir="unused"))
    model = load_text_model(config, decoder_config(section), tokenizer)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.tensor([[5, end, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[end].any()
    assert model.get_input_embeddings().padding_idx == (None if padding == end else padding)


def test_the_same_texts_train_the_same_tokenizer():
    assert train_tokenizer(TEXTS, 300).to_str() == train_tokenizer(iter(TEXTS), 300).to_str()


def test_a_new_tokenizer_gives_back_what_it_is_given_and_ends_it(make_accelerator):
    _, tokenizer = new_model(make_accelerator())
    for text in ("le chat", "naïve 日本 £30, 👍"):  # characters it never saw among them
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) <= 300


def test_a_new_model_fits_its_tokenizer(make_accelerator):
    model, tokenizer = new_model(make_accelerator())
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 0
    assert model.generation_config.eos_token_id == 1
    assert model.dtype == torch.float32


def test_a_new_model_with_an_entry_of_the_wrong_type_is_refused():
    with pytest.raises(ConfigError, match=r"model\.config: .* cannot be loaded: .*'d_model' expected int"):
        encoder_decoder_config(Seq2SeqModelConfig(config=TINY | {"d_model": "wide"}))


@pytest.mark.parametrize(
    ("entries", "reads"),
    [
        (TINY, False),
        ({"model_type": "encoder-decoder", "encoder": BERT, "decoder": BERT}, True),
    ],
)
def test_a_tokenizer_makes_token_types_for_a_model_that_reads_them_alone(entries, reads, tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(TEXTS, 300),
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    section = Seq2SeqModelConfig(config=entries, tokenizer_name="given")
    settings = Seq2SeqConfig(model=section, train=Seq2SeqTrainConfig(output_dir="unused"))
    model = load_text_model(settings, encoder_decoder_config(section), tokenizer)
    tokenizer.save_pretrained(tmp_path)
    batch = PreTrainedTokenizerFast.from_pretrained(tmp_path)(["the cat"], return_tensors="pt")
    assert ("token_type_ids" in batch) == reads
    model.generate(**batch, max_new_tokens=2)


def test_what_the_settings_say_of_a_new_model_wins(make_accelerator):
    model, _ = new_model(make_accelerator(), decoder_start_token_id=1, vocab_size=400)
    assert (model.config.vocab_size, model.config.decoder_start_token_id) == (400, 1)


def test_a_new_model_with_a_vocabulary_of_its_own_for_the_decoder_fits_too(make_accelerator):
    sizes = {"d_model": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    section = Seq2SeqModelConfig(
        config={"model_type": "marian", "share_encoder_decoder_embeddings": False, **sizes}
    )
    tokenizer = new_tokenizer(section, make_accelerator(), lambda: TEXTS)
    config = encoder_decoder_config(section)
    settings = Seq2SeqConfig(model=section, train=Seq2SeqTrainConfig(output_dir="unused"))
    model = load_text_model(settings, config, tokenizer)
    assert model.config.decoder_vocab_size == len(tokenizer)


def test_the_seed_decides_on_the_weights(make_accelerator):
    accelerator = make_accelerator()
    one, same, other = (new_model(accelerator, seed)[0].shared.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_decoder_that_is_none_is_made_one_where_it_is_new_and_refused_where_it_is_trained(tmp_path):
    parts = {name: {"model_type": "bert", "num_hidden_layers": 1} for name in ("encoder", "decoder")}
    new = encoder_decoder_config(Seq2SeqModelConfig(config={"model_type": "encoder-decoder"} | parts))
    assert new.decoder.is_decoder
    assert new.decoder.add_cross_attention
    EncoderDecoderConfig(**parts).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a bert, would see the whole text that it is to generate"):
        encoder_decoder_config(Seq2SeqModelConfig(model_name_or_path=str(tmp_path)))
    new.save_pretrained(tmp_path)
    encoder_decoder_config(Seq2SeqModelConfig(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("entry", ["pad_token_id", "eos_token_id", "bos_token_id"])
def test_a_new_model_with_other_special_tokens_than_its_tokenizer_is_refused(entry, make_accelerator):
    _, tokenizer = new_model(make_accelerator())
    section = Seq2SeqModelConfig(config=TINY | {entry: 7})
    for known in (tokenizer, None):
        with pytest.raises(ConfigError, match=f"model.config: {entry} is 7, but the tokenizer's is"):
            check_new_model(section, known)
    check_new_model(Seq2SeqModelConfig(config=TINY | {"pad_token_id": 0, "eos_token_id": 1}), None)
