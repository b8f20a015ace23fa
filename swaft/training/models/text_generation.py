"""Loads models that generate text, encoder-decoders and decoders, or makes new ones with a tokenizer of their own.

An encoder-decoder generates as it is trained: same start, end and padding tokens, same language.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from difflib import get_close_matches
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from swaft.errors import ConfigError, one_line
from swaft.options import suggestion
from swaft.training.data.seq2seq import PairColumns, Seq2SeqDataConfig, Seq2SeqModelConfig, bleu_language
from swaft.training.data.texts import shortened
from swaft.training.models.checks import (
    START_WITH_THE_END,
    embedding_rows,
    require_decoder_start,
    require_order,
)
from swaft.training.models.pretrained import (
    load_form,
    load_model_config,
    model_path,
    naming_settings,
    with_adapters,
    with_checkpointing,
)
from swaft.training.models.special_tokens import put_first


def require_generation_start(model: Seq2SeqModelConfig, model_config: Any, tokenizer: Any) -> None:
    """Refuse an encoder-decoder without a start token for the texts that it generates; tokenizer None: a new one.

    Raises:
        ConfigError: there is no start token.
    """
    start = None
    if model.config is not None:
        start = model.config.get("decoder_start_token_id", 0)  # by default the tokenizer's padding token
    elif getattr(model_config, "decoder_start_token_id", None) is None:
        with suppress(OSError):  # a folder without generation settings
            start = GenerationConfig.from_pretrained(model_path(model)).decoder_start_token_id
    require_decoder_start(model, model_config, start=start, may_start_with_end=knows_languages(tokenizer))


def generate_as_trained(model: Any, tokenizer: Any) -> None:
    """Make a model generate with the start, end and padding tokens, and in the language, that it is trained with.

    The model is an encoder-decoder whose configuration follows the tokenizer; its generation settings are saved
    with it, and the tokenizer makes no inputs that it does not read. mBART's decoder starts with the code of the
    language. Those of mBART-50, M2M100 and NLLB start with another token, and the code is the first token of the
    text, which generation is forced to start with.
    """
    config, generation = model.config, model.generation_config
    if "token_type_ids" not in signature(model.get_encoder().forward).parameters:
        # A BERT's tokenizer makes them for a BART or T5 too, whose `generate` refuses what they do not read.
        read = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = read
    labels = tokenizer(text_target="a").input_ids
    end = tokenizer.eos_token_id
    if end is None and labels[-1] in tokenizer.all_special_ids:
        end = labels[-1]  # BERT's separator, with which a decoder made from a BERT learns to end
    _generate_with(generation, tokenizer, end)
    if generation.forced_eos_token_id is not None:
        generation.forced_eos_token_id = end
    code = language_codes(tokenizer)[tokenizer.tgt_lang] if knows_languages(tokenizer) else None
    starts = (getattr(holder, "decoder_start_token_id", None) for holder in (config, generation))
    start = next((token for token in starts if token is not None), None)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if start is not None:
        config.decoder_start_token_id = start  # read by the model's own shift
    if shift is not None and (start is not None or code is not None):
        start = shift(torch.tensor([labels]))[0, 0].item()
    config.decoder_start_token_id = generation.decoder_start_token_id = start
    if code is not None:
        generation.forced_bos_token_id = None if code == start else code
    elif generation.forced_bos_token_id != labels[0]:
        generation.forced_bos_token_id = None


def _generate_with(generation: Any, tokenizer: Any, end: int | None) -> None:
    tokens = {"pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id, "eos": end}
    for kind, found in tokens.items():
        if found is not None:
            name = f"{kind}_token_id"
            setattr(generation, name, put_first(found, getattr(generation, name)))


def require_saving(generation: Any, model: Seq2SeqModelConfig) -> None:
    """Refuse generation settings that transformers would refuse to save with the trained model.

    It saves what it has loaded, faults included, but not once a token has changed. Older checkpoints have settings
    for sampling without `do_sample`, which is then set; evaluation never samples.

    Raises:
        ConfigError: says what is wrong with them.
    """
    if getattr(generation, "_original_object_hash", None) == hash(generation):  # as `save_pretrained` sees it
        return
    says_nothing = generation.do_sample is None
    try:
        generation.validate(strict=True)
    except ValueError as error:
        if says_nothing:
            generation.do_sample = True
            with suppress(ValueError):
                generation.validate(strict=True)
                return
        raise ConfigError(
            f"{model.setting}: the generation_config.json of {model_path(model) or 'the new model'} (if it has "
            "none, its config.json) could not be saved with the trained model; correct it in a copy of the "
            f"model: {one_line(error)[:500]}"
        ) from error


def set_languages(tokenizer: Any, data: Seq2SeqDataConfig, columns: PairColumns) -> None:
    """Make a multilingual tokenizer put the codes of the source and target language into its texts.

    Args:
        tokenizer: the model's; it keeps the two languages when saved. None: a new one, which knows no languages.
        data: section ``data``, with ``source_lang`` and ``target_lang``.
        columns: where the texts are, from `find_pairs`.

    Raises:
        ConfigError: for a multilingual tokenizer, a language that is not set or unknown to it; for others,
            languages that nothing uses.
    """
    if not knows_languages(tokenizer):
        selects = data.source_column is None and columns.source_lang is not None
        if data.source_lang is not None and not selects and not bleu_language(data.target_lang):
            raise ConfigError(
                f"data.source_lang: {data.source_lang} is used by nothing: it does not select texts from a "
                "column 'translation', the model's tokenizer puts no language codes into them, and BLEU has no "
                f"tokenizer for {data.target_lang}; leave data.source_lang and data.target_lang out"
            )
        return
    codes = list(language_codes(tokenizer))
    problems = []
    for name in ("source_lang", "target_lang"):
        if (code := getattr(data, name)) not in codes:
            begin_so = [known for known in codes if code and known.startswith(code)]
            near = begin_so[:3] or get_close_matches(code or "", codes, n=3)
            hint = f"did you mean {' or '.join(near)}? It has" if near else "expected one of"
            unknown = f"{type(tokenizer).__name__} has no language {code!r}"
            problems.append(f"data.{name}: {unknown}; {hint} {shortened(codes)}")
    if problems:
        raise ConfigError(problems)
    named = {"src_lang": data.source_lang, "tgt_lang": data.target_lang}
    for name, code in named.items():
        setattr(tokenizer, name, code)
    tokenizer.init_kwargs.update(named)  # these are saved with the tokenizer


def knows_languages(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a language code into its texts."""
    return hasattr(tokenizer, "src_lang")


def language_codes(tokenizer: Any) -> dict[str, int]:
    """Return the languages of a tokenizer, each with the id of its token."""
    # M2M100's token for a code is spelled differently; for the others the token is the code.
    token_id = getattr(tokenizer, "get_lang_id", tokenizer.convert_tokens_to_ids)
    codes = getattr(tokenizer, "lang_code_to_id", None) or tokenizer.extra_special_tokens
    ids = {str(code): token_id(str(code)) for code in codes}
    return {code: number for code, number in ids.items() if number not in (None, tokenizer.unk_token_id)}


def require_target_language(model_config: Any, tokenizer: Any) -> None:
    """Refuse a multilingual model if neither its labels nor its decoder start with a code for the target language.

    The tokenizer is the one that is used, after `set_languages`; None: a new one.

    Raises:
        ConfigError: nothing tells the model which language to write.
    """
    if not knows_languages(tokenizer):
        return
    kind, labels = model_config.model_type, tokenizer(text_target="a").input_ids
    start = (
        labels[-1] if kind in START_WITH_THE_END else getattr(model_config, "decoder_start_token_id", None)
    )
    if language_codes(tokenizer)[tokenizer.tgt_lang] not in (start, labels[0]):
        raise ConfigError(
            f"model.tokenizer_name: {type(tokenizer).__name__} puts the language code at the end of "
            f"targets, and the decoder of a {kind} does not start with it, so nothing says which "
            "language to write; for NLLB set legacy_behaviour to false in tokenizer_config.json"
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
"""Entries of a new model's configuration that come from its tokenizer, unless the settings give them."""


def encoder_decoder_config(model: Seq2SeqModelConfig) -> Any:
    """Return the transformers configuration of the pretrained model, or of the new one.

    Raises:
        ConfigError: the model is not an encoder-decoder, its decoder part is not a decoder, or its type has no such
            entry.
    """
    found = load_model_config(model) if model.config is None else _new_config(model)
    if not found.is_encoder_decoder:
        raise ConfigError(
            f"{model.setting}: {found.model_type} is not an encoder-decoder; expected a model such as T5, BART, "
            "Pegasus or Marian"
        )
    if found.model_type == "encoder-decoder":
        decoder = found.decoder
        if model.config is not None:
            decoder.is_decoder = decoder.add_cross_attention = True
        if not (getattr(decoder, "is_decoder", True) and getattr(decoder, "add_cross_attention", False)):
            raise ConfigError(
                f"{model.setting}: its decoder, a {decoder.model_type}, would see the whole text that it is "
                "to generate, and nothing of the source; expected is_decoder and add_cross_attention to be true "
                "for the decoder in config.json, as EncoderDecoderModel.from_encoder_decoder_pretrained sets them"
            )
    return found


def decoder_config(model: Seq2SeqModelConfig) -> Any:
    """Return the transformers configuration of the pretrained decoder, or of the new one.

    Raises:
        ConfigError: the model is not a decoder, or its type has no such entry.
    """
    found = load_model_config(model) if model.config is None else _new_config(model)
    # A causal XLM is left out: its loss compares a token with itself, not with the next.
    sees_all = type(found) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(found, "is_decoder", False)
    if found.is_encoder_decoder or sees_all:
        raise ConfigError(
            f"{model.setting}: {found.model_type} is not a decoder that continues a text; expected a model "
            "such as Llama, Qwen, Gemma or GPT-2 (encoder-decoders: recipes/seq2seq.py)"
        )
    return found


def check_new_model(model: Seq2SeqModelConfig, tokenizer: Any) -> None:
    """Refuse settings of a new model that do not fit its tokenizer; None: one is trained.

    Raises:
        ConfigError: names the special tokens that differ, or both vocabulary sizes.
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
    """Return a tokenizer for a new model, which the main process trains on these texts (collective)."""
    trained = [None]
    if accelerator.is_main_process:
        trained = [train_tokenizer(texts(), model.most_tokens).to_str()]  # type: ignore[list-item]
    broadcast_object_list(trained)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(str(trained[0])), pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    It knows every character and ends each text with ``</s>``; padding has id 0 and the end token id 1, as in T5.

    Args:
        texts: the training rows, sources and targets.
        vocab_size: most tokens, including 256 bytes and 3 special ones.
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


def load_text_model(config: Any, model_config: Any, tokenizer: Any, *, ends: Collection[int] = ()) -> Any:
    """Return the pretrained model, or a new one with random weights, in fp32.

    Args:
        config: configuration of a recipe whose task is sequence to sequence or causal language modelling.
        model_config: from `encoder_decoder_config` or `decoder_config`; a new model's takes the tokenizer's size
            and special tokens, unless ``model.config`` says otherwise.
        tokenizer: the model's, or from `new_tokenizer`; a multilingual one after `set_languages`.
        ends: further tokens with which a decoder learns to end its answers, from `ends_of_answers`.

    Raises:
        ConfigError: the model cannot be loaded, its generation settings cannot be saved, or `require_order` refuses
            it.
    """
    if config.model.config is not None:
        _fit_to_tokenizer(model_config, tokenizer, said=config.model.config)
    loaded = load_form(config, model_config)
    if config.task == "sequence to sequence":
        generate_as_trained(loaded, tokenizer)
    else:
        require_order(loaded, config.model.setting, packs=config.data.packing)
        generation = loaded.generation_config
        _generate_with(generation, tokenizer, tokenizer.eos_token_id)
        known = generation.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        if more := sorted({*ends} - {*known}):  # Qwen's base models end texts, and its template answers
            generation.eos_token_id = [*known, *more]
        # For generation from the saved folder; `CausalCollator` ignores the padding side.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if not config.model.use_peft:  # a folder of adapters takes any
        require_saving(loaded.generation_config, config.model)
    loaded = with_checkpointing(loaded, config.train.gradient_checkpointing)
    return with_adapters(loaded, config.model, task=config.task)


def _new_config(model: Seq2SeqModelConfig) -> Any:
    said = dict(model.config or {})
    kind = said.pop("model_type")
    try:
        known = AutoConfig.for_model(kind)
    except ValueError as error:
        raise ConfigError(
            f"model.config: there is no model_type '{kind}'; expected one such as t5, bart or llama"
        ) from error
    # transformers accepts any entry and uses those it knows.
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
                part.bos_token_id = tokenizer.pad_token_id  # T5Gemma's decoder starts with it
