"""Tells models of many languages (mBART, M2M100, NLLB) which one they read and which one they write."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch

from swaft.errors import ConfigError
from swaft.training.config import Seq2SeqDataConfig
from swaft.training.data.checks import shortened
from swaft.training.data.seq2seq import PairColumns


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
    for setting, code in (("data.source_lang", data.source_lang), ("data.target_lang", data.target_lang)):
        if code not in codes:
            begin_so = [known for known in codes if code and known.startswith(code)]
            near = begin_so[:3] or get_close_matches(code or "", codes, n=3)
            hint = f"did you mean {' or '.join(near)}? It has" if near else "expected one of"
            problems.append(
                f"{setting}: {type(tokenizer).__name__} has no language {code!r}; {hint} {shortened(codes)}"
            )
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


def write_target_language(model: Any, tokenizer: Any) -> None:
    """Have a model of many languages begin its texts as the labels it learns from begin.

    mBART's decoder starts with the code of the language. That of mBART-50, M2M100 and NLLB starts with another
    token, and the code is the first token of the text, which generation is made to begin with. Changed are the
    model's configuration and generation settings, which are saved with it.

    Raises:
        ConfigError: where labels and decoder begin with no code, so that the model cannot know the language.
    """
    if not knows_languages(tokenizer):
        return
    code = language_codes(tokenizer)[tokenizer.tgt_lang]
    labels = torch.tensor([tokenizer(text_target="a").input_ids])
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    start = model.config.decoder_start_token_id if shift is None else shift(labels)[0, 0].item()
    if code not in (start, labels[0, 0].item()):
        raise ConfigError(
            f"model.tokenizer_name: {type(tokenizer).__name__} puts the code of the language at the end of "
            f"targets, and the decoder of {type(model).__name__} does not start with it, so nothing says which "
            "language to write; for NLLB set legacy_behaviour to false in tokenizer_config.json"
        )
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = start
    model.generation_config.forced_bos_token_id = None if code == start else code
