"""Loads encoder-decoders and decoders, or makes new ones with a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from swaft.errors import ConfigError
from swaft.options import suggestion
from swaft.training.config.seq2seq import Seq2SeqModelConfig
from swaft.training.models.checks import embedding_rows
from swaft.training.models.generation import generate_as_trained, write_target_language
from swaft.training.models.pretrained import (
    load_model_config,
    model_path,
    naming_settings,
    with_adapters,
    with_checkpointing,
)

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
FITTED: dict[str, Callable[[Any], int | None]] = {
    "vocab_size": len,
    "pad_token_id": attrgetter("pad_token_id"),
    "eos_token_id": attrgetter("eos_token_id"),
    "bos_token_id": attrgetter("bos_token_id"),
    "decoder_start_token_id": attrgetter("pad_token_id"),
    "forced_eos_token_id": lambda _: None,
}
"""Entries of a new model's configuration that its tokenizer decides on, where the settings do not."""


def encoder_decoder_config(model: Seq2SeqModelConfig) -> Any:
    """Return the transformers configuration of the pretrained model, or of the new one.

    Raises:
        ConfigError: where it is no encoder-decoder, is made of a decoder that is none, or an entry is none of its
            type's.
    """
    found = load_model_config(model) if model.config is None else _new_config(model)
    if not found.is_encoder_decoder:
        raise ConfigError(
            f"{model.setting}: {found.model_type} is no encoder-decoder; expected a model such as T5, BART, "
            "Pegasus or Marian"
        )
    if found.model_type == "encoder-decoder":
        decoder = found.decoder
        if model.config is not None:
            decoder.is_decoder = decoder.add_cross_attention = True
        if not (getattr(decoder, "is_decoder", True) and getattr(decoder, "add_cross_attention", False)):
            raise ConfigError(
                f"{model.setting}: its decoder, a {decoder.model_type}, would see the whole text that it is "
                "to generate, and nothing of the source; expected is_decoder and add_cross_attention to be true of "
                "the decoder in config.json, as EncoderDecoderModel.from_encoder_decoder_pretrained has it"
            )
    return found


def decoder_config(model: Seq2SeqModelConfig) -> Any:
    """Return the transformers configuration of the pretrained decoder, or of the new one.

    Raises:
        ConfigError: where transformers has no form of it that continues a text, or an entry is none of its type's.
    """
    found = load_model_config(model) if model.config is None else _new_config(model)
    brings_its_own = "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {})
    if found.is_encoder_decoder or (type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING and not brings_its_own):
        raise ConfigError(
            f"{model.setting}: {found.model_type} is no decoder that continues a text; expected a model "
            "such as Llama, Qwen, Gemma or GPT-2 (encoder-decoders: recipes/seq2seq.py)"
        )
    return found


def check_new_model(model: Seq2SeqModelConfig, tokenizer: Any) -> None:
    """Refuse settings of a new model that do not go with its tokenizer; None: one is trained.

    Raises:
        ConfigError: names the tokens that are special to one of them alone, or both numbers of tokens.
    """
    said = model.config or {}
    trained = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    problems = [
        f"model.config: {name} is {value}, but the tokenizer's is {expected}; leave it out"
        for name, value in said.items()
        if name in trained and value != (expected := getattr(tokenizer, name, trained[name]))
    ]
    rows = embedding_rows(said)
    if tokenizer is None and rows is not None and model.most_tokens > rows:
        problems.append(
            f"model.config: vocab_size is {rows}, but the new tokenizer may have {model.most_tokens} tokens; "
            "leave it out, or set model.vocab_size to as many"
        )
    if problems:
        raise ConfigError(problems)


def new_tokenizer(
    model: Seq2SeqModelConfig, accelerator: Accelerator, texts: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerFast:
    """Return a tokenizer for a new model, trained on these texts by the main process (collective)."""
    trained = [None]
    if accelerator.is_main_process:
        trained = [train_tokenizer(texts(), model.most_tokens).to_str()]  # type: ignore[list-item]
    broadcast_object_list(trained)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(str(trained[0])), pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    It knows every character and ends each text with ``</s>``; padding has the id 0 and the end 1, as T5's have.

    Args:
        texts: the training rows, sources and targets.
        vocab_size: tokens at most, 256 bytes and 3 special ones among them.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )
    return tokenizer


def load_encoder_decoder(
    model: Seq2SeqModelConfig, model_config: Any, tokenizer: Any, *, seed: int, gradient_checkpointing: bool
) -> Any:
    """Return the pretrained encoder-decoder, or a new one of random weights, in fp32.

    Args:
        model: section ``model``.
        model_config: from `encoder_decoder_config`; a new model's takes the tokenizer's size and special tokens,
            where ``model.config`` says nothing else.
        tokenizer: the model's, or from `new_tokenizer`; one of many languages after `set_languages`.
        seed: of the random weights; given to torch right here, so that all ranks have the same.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ConfigError: where the model cannot be loaded.
    """
    loaded = _load(AutoModelForSeq2SeqLM, model, model_config, tokenizer, seed)
    generate_as_trained(loaded, tokenizer)
    write_target_language(loaded, tokenizer)
    loaded = with_checkpointing(loaded, gradient_checkpointing)
    return with_adapters(loaded, model, task="sequence to sequence")


def load_decoder(
    model: Seq2SeqModelConfig, model_config: Any, tokenizer: Any, *, seed: int, gradient_checkpointing: bool
) -> Any:
    """Return the pretrained decoder, or a new one of random weights, in fp32, as `load_encoder_decoder` does."""
    loaded = _load(AutoModelForCausalLM, model, model_config, tokenizer, seed)
    # Training reads no cache, and packed rows would see each other through one.
    loaded.config.use_cache = False
    loaded = with_checkpointing(loaded, gradient_checkpointing)
    return with_adapters(loaded, model, task="causal language modelling")


def _load(kind: Any, model: Seq2SeqModelConfig, model_config: Any, tokenizer: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    with naming_settings(model):
        if model.config is None:
            own = {"config": model_config, "trust_remote_code": model.trust_remote_code}
            return kind.from_pretrained(model_path(model), dtype="float32", **own)
        _fit_to_tokenizer(model_config, tokenizer, said=model.config)
        return kind.from_config(model_config, dtype=torch.float32)


def _new_config(model: Seq2SeqModelConfig) -> Any:
    said = dict(model.config or {})
    kind = said.pop("model_type")
    try:
        known = AutoConfig.for_model(kind)
    except ValueError as error:
        raise ConfigError(
            f"model.config: there is no model_type '{kind}'; expected one of an encoder-decoder, t5 or bart say"
        ) from error
    # transformers takes any entry and uses those it knows.
    entries = list(known.to_dict())
    problems = [
        f"model.config: {kind} has no entry '{name}'.{suggestion(name, entries)}"
        for name in said
        if name not in FITTED and not hasattr(known, name)
    ]
    if problems:
        raise ConfigError(problems)
    with naming_settings(model):
        return AutoConfig.for_model(kind, **said)


def _fit_to_tokenizer(model_config: Any, tokenizer: Any, *, said: dict[str, Any]) -> None:
    for name, value_of in FITTED.items():
        if name not in said:
            setattr(model_config, name, value_of(tokenizer))
    if hasattr(model_config, "decoder_vocab_size") and "decoder_vocab_size" not in said:  # Marian has two
        model_config.decoder_vocab_size = model_config.vocab_size
    for name, part in vars(model_config).items():
        if isinstance(part, PreTrainedConfig):
            _fit_to_tokenizer(part, tokenizer, said=said.get(name, {}))
            if part.bos_token_id is None:
                part.bos_token_id = tokenizer.pad_token_id  # what T5Gemma's decoder starts with
