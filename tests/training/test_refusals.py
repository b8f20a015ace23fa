"""What is refused of a model and its tokenizer before anything starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    EncoderDecoderConfig,
    Gemma3Config,
    GenerationConfig,
    LEDConfig,
    LongT5Config,
    M2M100Config,
    MBartConfig,
    MixtralConfig,
    MPNetConfig,
    MptConfig,
    NllbMoeConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    SwitchTransformersConfig,
    T5Config,
    T5GemmaConfig,
    XLNetConfig,
)

from swaft.errors import ConfigError
from swaft.training.checks import keep_all_layers, refuse_routing
from swaft.training.config import ModelConfig
from swaft.training.data.seq2seq import Seq2SeqModelConfig
from swaft.training.models.checks import (
    require_decoder_start,
    require_embeddings,
    require_form,
    require_separate_rows,
    require_text,
    require_token_types,
)
from swaft.training.models.pretrained import FORMS, UNLIMITED, longest_input, longest_text
from swaft.training.models.text_generation import check_new_model, require_generation_start
from swaft.training.planning.step import planned_model

pytestmark = pytest.mark.unit

PRETRAINED = ModelConfig(model_name_or_path="some/model")
WRITES = Seq2SeqModelConfig(model_name_or_path="some/model")


def tokenizer(words: int = 8, length: int = 16) -> PreTrainedTokenizerFast:
    """Ten tokens: a pad, an end that stands behind every text, and words."""
    vocabulary = {
        word: index for index, word in enumerate(["<pad>", "</s>", *(f"w{i}" for i in range(words))])
    }
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", model_max_length=length
    )


@pytest.mark.parametrize(
    ("config", "reads", "writes"),
    [
        (BertConfig(max_position_embeddings=64), 64, 64),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512, 512),
        (RobertaConfig(max_position_embeddings=64, pad_token_id=3), 60, 60),
        (
            MPNetConfig(max_position_embeddings=64, pad_token_id=3),
            62,
            62,
        ),  # its positions count from 1 all the same
        (DebertaV2Config(relative_attention=True, position_biased_input=False), UNLIMITED, UNLIMITED),
        (DebertaV2Config(relative_attention=True, max_position_embeddings=64), 64, 64),
        (T5Config(), UNLIMITED, UNLIMITED),
        (LongT5Config(), UNLIMITED, UNLIMITED),
        (BartConfig(max_position_embeddings=64), 64, 64),
        (LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32), 64, 32),
        (MptConfig(max_seq_len=64), 64, 64),
        (Gemma3Config(text_config={"max_position_embeddings": 64}), 64, 64),
        (XLNetConfig(), 16, 16),
        (
            EncoderDecoderConfig(
                encoder=RobertaConfig(max_position_embeddings=64, pad_token_id=1).to_dict(),
                decoder=BertConfig(max_position_embeddings=32).to_dict(),
            ),
            62,
            32,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_reads_and_writes_as_many_tokens_as_it_has_positions(config, reads, writes):
    assert longest_input(config, tokenizer()) == reads
    assert longest_input(config, tokenizer(), decoder=True) == writes
    assert longest_text(config, tokenizer()) == (reads if reads == UNLIMITED else min(reads, 16))


def test_a_new_model_without_positions_reads_any_length():
    assert longest_input(XLNetConfig(), None) == UNLIMITED


@pytest.mark.parametrize("section", [PRETRAINED, WRITES])
def test_tokens_of_texts_without_an_embedding_are_refused(section):
    config, made = BartConfig(vocab_size=10), tokenizer()
    require_embeddings(section, config, made)
    made.add_tokens(["<user>", "<url>"])
    with pytest.raises(
        ConfigError, match=r"model_name_or_path: the model has 10 embeddings, but .* 12 tokens \('<user>'"
    ):
        require_embeddings(section, config, made)
    require_embeddings(section, BartConfig(vocab_size=12), made)


def test_a_padding_token_without_an_embedding_is_refused_and_one_that_nothing_uses_is_not():
    config, made = Gemma3Config(text_config={"vocab_size": 10}), tokenizer()
    made.split_special_tokens = True
    made.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    require_embeddings(PRETRAINED, config, made)
    made.split_special_tokens = False
    with pytest.raises(ConfigError, match=r"'<picture>' is the first.*data\.split_special_tokens=false"):
        require_embeddings(PRETRAINED, config, made)
    made.split_special_tokens = True
    made.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ConfigError, match=r"has 10 embeddings, but the tokenizer has 12 tokens \('\[PAD\]'"):
        require_embeddings(PRETRAINED, config, made)


@pytest.mark.parametrize("columns", [["text"], ["question", "context"]])
def test_texts_of_more_types_than_a_model_has_embeddings_for_are_refused(columns):
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    made.model_input_names = [*made.model_input_names, "token_type_ids"]
    require_token_types(PRETRAINED, RobertaConfig(type_vocab_size=2), made, columns)
    require_token_types(PRETRAINED, T5Config(), made, columns)
    if len(columns) == 1:
        require_token_types(PRETRAINED, RobertaConfig(type_vocab_size=1), made, columns)
        return
    with pytest.raises(ConfigError, match="has 1 embeddings for token types, but the tokenizer uses 2"):
        require_token_types(PRETRAINED, RobertaConfig(type_vocab_size=1), made, columns)


def new(**entries: Any) -> tuple[Seq2SeqModelConfig, Any]:
    section = Seq2SeqModelConfig(config={"model_type": "t5", **entries}, vocab_size=300)
    return section, AutoConfig.for_model("t5", **entries)


def test_a_new_model_is_made_as_large_as_its_tokenizer_unless_its_settings_say_less():
    check_new_model(new()[0], None)
    require_embeddings(*new(), tokenizer(words=40_000))
    check_new_model(new(vocab_size=300)[0], None)
    with pytest.raises(ConfigError, match="vocab_size is 299, but the new tokenizer may have 300 tokens"):
        check_new_model(new(vocab_size=299)[0], None)
    with pytest.raises(
        ConfigError, match=r"model\.config: the model has 9 embeddings, but the tokenizer has 10"
    ):
        require_embeddings(*new(vocab_size=9), tokenizer())


@pytest.mark.parametrize("config", [BartConfig, T5Config])
def test_a_decoder_that_does_not_know_where_to_start_is_refused_in_every_task(config, tmp_path):
    reads = ModelConfig(model_name_or_path=str(tmp_path))
    writes = Seq2SeqModelConfig(model_name_or_path=str(tmp_path))
    unknown, known = config(decoder_start_token_id=None), config(decoder_start_token_id=0)
    with pytest.raises(ConfigError, match="the model has no decoder_start_token_id"):
        require_decoder_start(reads, unknown)
    with pytest.raises(ConfigError, match="the model has no decoder_start_token_id"):
        require_generation_start(writes, unknown, tokenizer())
    require_decoder_start(reads, known)
    require_generation_start(writes, known, tokenizer())


def test_a_decoder_starts_as_its_generation_settings_say_where_it_generates(tmp_path: Path):
    GenerationConfig(decoder_start_token_id=1).save_pretrained(tmp_path)
    require_generation_start(Seq2SeqModelConfig(model_name_or_path=str(tmp_path)), T5Config(), tokenizer())
    with pytest.raises(ConfigError, match="no decoder_start_token_id"):
        require_decoder_start(ModelConfig(model_name_or_path=str(tmp_path)), T5Config())


def test_decoders_with_a_start_of_their_own_need_none():
    require_decoder_start(PRETRAINED, BertConfig())
    require_decoder_start(PRETRAINED, MBartConfig(decoder_start_token_id=None))
    require_generation_start(WRITES, T5GemmaConfig(), tokenizer())
    require_generation_start(*new(), None)  # starts with its tokenizer's padding
    with pytest.raises(ConfigError, match=r"model\.config: the model has no decoder_start_token_id"):
        require_generation_start(*new(decoder_start_token_id=None), None)


@pytest.mark.parametrize("config", [SwitchTransformersConfig(), NllbMoeConfig()])
def test_experts_that_are_modules_are_refused_on_several_ranks(config):
    refuse_routing(config, 1)
    refuse_routing(MixtralConfig(), 2)
    with pytest.raises(ConfigError, match=f"starts 2 ranks, and the experts of a {config.model_type}"):
        refuse_routing(config, 2)


def test_several_ranks_leave_out_no_layers_and_one_does(caplog):
    config = M2M100Config()
    keep_all_layers(config, 1)
    assert (config.encoder_layerdrop, config.decoder_layerdrop) == (0.05, 0.05)
    with caplog.at_level("INFO", logger="swaft"):
        keep_all_layers(config, 2)
    assert (config.encoder_layerdrop, config.decoder_layerdrop) == (0.0, 0.0)
    assert "encoder_layerdrop=0.05 is set to 0: ranks would drop different layers" in caplog.messages


def test_rows_are_packed_only_where_it_is_known_that_they_do_not_see_each_other():
    def refused(kind: str, *, size: int = 8, packing: bool = True, passes: Any = None, **entries: Any) -> str:
        config = SimpleNamespace(
            data=SimpleNamespace(packing=packing),
            noise=SimpleNamespace(passes=passes),
            model=ModelConfig(model_name_or_path="some/model", trust_remote_code=True),
            train=SimpleNamespace(per_device_train_batch_size=size),
        )
        try:
            require_separate_rows(config, AutoConfig.for_model(kind, **entries))
        except ConfigError as error:
            return str(error)
        return ""

    flash: dict[str, Any] = {"attn_implementation": "flash_attention_2"}
    assert "packed rows of rwkv may see each other" in refused("rwkv")
    assert "its code is its own" in refused("llama", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert "set train.per_device_train_batch_size=1" in refused("llama", **flash)
    assert "noise.passes=two" in refused("llama", size=1, passes="doubled", **flash)
    assert not refused("llama")
    assert not refused("llama", size=1, **flash)
    assert not refused("rwkv", packing=False)


@pytest.mark.parametrize("kind", ["lxmert", "layoutlmv2", "fsmt", "prophetnet", "tapas"])
def test_a_model_that_text_alone_does_not_train_is_refused(kind):
    with pytest.raises(ConfigError, match=f"a {kind} .*so rows of text alone do not train it"):
        require_text(PRETRAINED, AutoConfig.for_model(kind))
    require_text(PRETRAINED, BertConfig())


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (M2M100Config(), "sequence classification"),
        (M2M100Config(), "question answering"),
        (BertConfig(), "sequence to sequence"),
        (DebertaV2Config(), "causal language modelling"),
    ],
)
def test_a_type_without_a_form_for_the_task_is_refused_unless_it_brings_its_own(config, task):
    with pytest.raises(ConfigError, match=f"a {config.model_type} has no form for {task} in transformers"):
        require_form(PRETRAINED, config, task)
    config.auto_map = {FORMS[task].auto.__name__: "modeling.Model"}
    require_form(PRETRAINED, config, task)


def test_a_task_that_the_recipes_do_not_know_is_refused_with_those_they_do():
    listed = r"'token classification' is not one of sequence classification, question answering, .*modelling"
    with pytest.raises(ConfigError, match=listed):
        require_form(PRETRAINED, BertConfig(), "token classification")
    config: Any = SimpleNamespace(model=PRETRAINED, task="token classification")
    with pytest.raises(ConfigError, match=listed):
        planned_model(config, BertConfig())


def test_of_a_model_that_reads_images_the_text_model_is_asked_for():
    with pytest.raises(ConfigError, match=r"a mistral3 also reads images .* Save its text model, a mistral,"):
        require_form(PRETRAINED, AutoConfig.for_model("mistral3"), "causal language modelling")
