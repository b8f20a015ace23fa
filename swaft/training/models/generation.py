"""How an encoder-decoder generates as it is trained: what its texts begin, end and are padded with; languages."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import torch
from transformers import GenerationConfig

from swaft.errors import ConfigError
from swaft.training.config.seq2seq import Seq2SeqDataConfig, Seq2SeqModelConfig
from swaft.training.data.checks import shortened
from swaft.training.data.seq2seq import PairColumns
from swaft.training.models.checks import START_WITH_THE_END, require_decoder_start
from swaft.training.models.pretrained import model_path
from swaft.training.models.special_tokens import put_first


def require_generation_start(model: Seq2SeqModelConfig, model_config: Any, tokenizer: Any) -> None:
    """Refuse an encoder-decoder that does not know what the texts that it generates start with.

    Args:
        model: section ``model``.
        model_config: its transformers configuration.
        tokenizer: the one that is used; None: a new one.

    Raises:
        ConfigError: as said.
    """
    start = None
    if model.config is not None:
        start = model.config.get(
            "decoder_start_token_id", 0
        )  # the tokenizer's padding, where nothing is said
    elif getattr(model_config, "decoder_start_token_id", None) is None:
        with suppress(OSError):  # a folder without generation settings
            start = GenerationConfig.from_pretrained(model_path(model)).decoder_start_token_id
    require_decoder_start(model, model_config, start=start, may_start_with_end=knows_languages(tokenizer))


def generate_as_trained(model: Any, tokenizer: Any) -> None:
    """Have a model generate with the tokens that it is trained with: where it starts, what it ends and pads with.

    It is an encoder-decoder whose configuration follows the tokenizer; its generation settings are saved with it.
    """
    config, generation = model.config, model.generation_config
    labels = tokenizer(text_target="a").input_ids
    end = tokenizer.eos_token_id
    if end is None and labels[-1] in tokenizer.all_special_ids:
        end = labels[-1]  # BERT's separator, which a decoder made of a BERT learns to end with
    for kind, found in (("pad", tokenizer.pad_token_id), ("bos", tokenizer.bos_token_id), ("eos", end)):
        if found is not None:
            name = f"{kind}_token_id"
            setattr(generation, name, put_first(found, getattr(generation, name)))
    if generation.forced_eos_token_id is not None:
        generation.forced_eos_token_id = end
    if generation.forced_bos_token_id != labels[0]:
        generation.forced_bos_token_id = None
    starts = (getattr(holder, "decoder_start_token_id", None) for holder in (config, generation))
    start = next((token for token in starts if token is not None), None)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if start is not None:
        config.decoder_start_token_id = start  # what the model's own shift looks at
        start = start if shift is None else shift(torch.tensor([labels]))[0, 0].item()
    config.decoder_start_token_id = generation.decoder_start_token_id = start


def set_languages(tokenizer: Any, data: Seq2SeqDataConfig, columns: PairColumns) -> None:
    """Have a tokenizer of many languages put the codes of these two into its texts; others need none.

    Args:
        tokenizer: the model's; saved later, it still knows the two. None: a new one, which knows no languages.
        data: section ``data``, with ``source_lang`` and ``target_lang``.
        columns: where the texts are, from `find_pairs`.

    Raises:
        ConfigError: for a tokenizer of many languages, a language that is not named or not known to it; for
            another, languages that nothing uses.
    """
    if not knows_languages(tokenizer):
        if data.source_lang is not None and (data.source_column is not None or columns.source_lang is None):
            raise ConfigError(
                f"data.source_lang: {data.source_lang} is used by nothing: the texts are not chosen by it from a "
                "column 'translation', and the model's tokenizer puts no languages into them; leave "
                "data.source_lang and data.target_lang out"
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
    tokenizer.init_kwargs.update(named)  # what a saved tokenizer is made of again


def knows_languages(tokenizer: Any) -> bool:
    """Whether a tokenizer puts the code of a language into its texts."""
    return hasattr(tokenizer, "src_lang")


def language_codes(tokenizer: Any) -> dict[str, int]:
    """Return the languages of a tokenizer, each with the id of its token."""
    # M2M100 has a token of another spelling for each code; for the others the token is the code.
    token_id = getattr(tokenizer, "get_lang_id", tokenizer.convert_tokens_to_ids)
    codes = getattr(tokenizer, "lang_code_to_id", None) or tokenizer.extra_special_tokens
    ids = {str(code): token_id(str(code)) for code in codes}
    return {code: number for code, number in ids.items() if number not in (None, tokenizer.unk_token_id)}


def require_target_language(model_config: Any, tokenizer: Any) -> None:
    """Refuse a model of many languages whose labels and decoder begin with no code, so that it cannot know which.

    The tokenizer is the one that is used, after `set_languages`; None: a new one.

    Raises:
        ConfigError: as said.
    """
    if not knows_languages(tokenizer):
        return
    kind, labels = model_config.model_type, tokenizer(text_target="a").input_ids
    start = (
        labels[-1] if kind in START_WITH_THE_END else getattr(model_config, "decoder_start_token_id", None)
    )
    if language_codes(tokenizer)[tokenizer.tgt_lang] not in (start, labels[0]):
        raise ConfigError(
            f"model.tokenizer_name: {type(tokenizer).__name__} puts the code of the language at the end of "
            f"targets, and the decoder of a {kind} does not start with it, so nothing says which "
            "language to write; for NLLB set legacy_behaviour to false in tokenizer_config.json"
        )


def write_target_language(model: Any, tokenizer: Any) -> None:
    """Have a model of many languages begin its texts as the labels it learns from begin.

    mBART's decoder starts with the code of the language. That of mBART-50, M2M100 and NLLB starts with another
    token, and the code is the first token of the text, which generation is made to begin with. Changed are the
    model's configuration and generation settings, which are saved with it.
    """
    if not knows_languages(tokenizer):
        return
    code = language_codes(tokenizer)[tokenizer.tgt_lang]
    labels = torch.tensor([tokenizer(text_target="a").input_ids])
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    start = model.config.decoder_start_token_id if shift is None else shift(labels)[0, 0].item()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = start
    model.generation_config.forced_bos_token_id = None if code == start else code
