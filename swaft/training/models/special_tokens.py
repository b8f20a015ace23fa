"""One truth for special tokens, the tokenizer's; which languages a model of many reads and generates."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PreTrainedConfig

from swaft.errors import ConfigError
from swaft.training.config import Seq2SeqDataConfig
from swaft.training.data.checks import shortened
from swaft.training.data.seq2seq import PairColumns

logger = logging.getLogger(__name__)


KINDS = ("pad", "bos", "eos", "unk", "sep", "cls", "mask")

COUNT_FROM_PADDING = frozenset(
    {
        *("camembert", "data2vec-text", "esm", "fsmt", "ibert", "layoutlmv3", "lilt", "longformer", "luke"),
        *("m2m_100", "markuplm", "mpnet", "nllb-moe", "prophetnet", "roberta", "roberta-prelayernorm"),
        *("seamless_m4t", "seamless_m4t_v2", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
"""Types of models whose positions begin after the id of padding: with another id they would read other positions
than they were trained with."""
READ_THEIR_END = frozenset({"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"})
"""Types whose classifiers answer at the last end-of-text token, of which they want as many in every row."""
MIX_PADDING_IN = frozenset(
    {
        *("canine", "convbert", "fnet", "funnel", "mobilebert", "mra", "nystromformer", "reformer"),
        *("t5gemma", "t5gemma2", "yoso"),
    }
)
"""Types that compute other logits for a row the more of it is padding, whatever the attention mask says: they
convolve, hash, pool or transform over it, or read the answer one token further."""


def follow_tokenizer(model_config: Any, tokenizer: Any) -> None:
    """Have a model take the tokenizer's word on special tokens, and the tokenizer pad where the model can take it.

    Absolute positions, and heads that read the first token, need padding on the right. Decoders read the last token
    that is no padding, so they can have it there, too. XLNet reads the last token of all.

    Args:
        model_config: transformers configuration; its ids of tokens, and those of its parts, become the tokenizer's.
            A token that the tokenizer lacks stays as it is.
        tokenizer: gets the padding side.
    """
    for kind in KINDS:
        write_token(model_config, kind, getattr(tokenizer, f"{kind}_token_id", None))
    tokenizer.padding_side = "left" if getattr(model_config, "summary_type", None) == "last" else "right"


def write_token(model_config: Any, kind: str, token_id: int | None) -> None:
    """Write the id of a special token into a configuration and its parts, where they know such a token.

    Every configuration knows padding. One that counts its positions from padding keeps the id that it has. The kind
    is one of `KINDS`; no id changes nothing.
    """
    name = f"{kind}_token_id"
    for config in _parts(model_config):
        found = getattr(config, name, None)
        is_needed = config.model_type in COUNT_FROM_PADDING and isinstance(found, int) and found >= 0
        if token_id is None or (is_needed if kind == "pad" else not hasattr(config, name)):
            continue
        setattr(config, name, _put_first(token_id, found))


def require_end_token(model_config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose rows a classifier would look in vain for its end token in, after `follow_tokenizer`.

    Raises:
        ConfigError: for a model that answers at the end token, where texts do not end with one, are padded with it,
            or may have more of them.
    """
    if model_config.model_type not in READ_THEIR_END:
        return
    end = tokenizer.eos_token_id
    if end is None or end not in tokenizer("a").input_ids:
        found = "puts none into its texts"
    elif end == tokenizer.pad_token_id:
        found = "pads with it, too; set its pad_token to another token"
    elif not tokenizer.split_special_tokens:
        found = "takes those that a text spells for such a one; leave out data.split_special_tokens=false"
    else:
        return
    raise ConfigError(
        f"model.tokenizer_name: a {model_config.model_type} classifier reads its answer at the end-of-text token, "
        f"and {type(tokenizer).__name__} {found}. Expected one in every row, at the end of its text"
    )


def one_length(model_config: Any, max_length: int, *, generates: bool = False) -> int | None:
    """Return the length that every row has to be padded to, so that its logits do not depend on its batch.

    Args:
        model_config: transformers configuration.
        max_length: tokens that rows are cut to.
        generates: whether the model generates texts, and rows are its sources.

    Returns:
        That many tokens; None: a batch may be as long as its longest row.

    Raises:
        ConfigError: for a model that reads rows of one length (a Nyströmformer with landmarks, a Reformer), and
            another length; for one that shortens its rows inside (CANINE, Funnel), and too short a length.
    """
    kind = model_config.model_type
    only = max_length
    if kind == "nystromformer" and model_config.segment_means_seq_len != model_config.num_landmarks:
        only = model_config.segment_means_seq_len
    if kind == "reformer":
        only = _reformer_length(model_config, max_length)
    if only != max_length:
        raise ConfigError(
            f"data.max_seq_length: this {kind} reads rows of {only} tokens and no others; "
            f"expected data.max_seq_length={only}"
        )
    least = 1
    if kind == "canine":
        least = model_config.downsampling_rate
    if kind == "funnel":  # each block but the first halves its row, and has to find two tokens
        least = 2 ** (len(model_config.block_sizes) - 1) + 1
    if max_length < least:
        raise ConfigError(
            f"data.max_seq_length is {max_length}, and this {kind} shortens its rows inside, which takes {least} "
            f"tokens at least; expected data.max_seq_length={least} or more"
        )
    # BigBird attends to all of a short batch, and ever after one: its blocks have to be the same for all rows.
    sparse = getattr(model_config, "attention_type", None) == "block_sparse" and (
        max_length > (5 + 2 * model_config.num_random_blocks) * model_config.block_size
    )
    if not sparse and (generates or kind not in MIX_PADDING_IN):
        return None
    logger.info("every row is padded to %d tokens: padding changes what a %s answers", max_length, kind)
    return max_length


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
            setattr(generation, name, _put_first(found, getattr(generation, name)))
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


def whole_windows(model_config: Any) -> int | None:
    """Return the number that has to divide the length of every batch; None: any length will do.

    LED pads to whole windows by itself, and embeds the padding in a call of its own. Ranks that each hold a shard
    of the table have to make that call together, and their batches are not of one length.
    """
    if model_config.model_type != "led":
        return None
    window = model_config.attention_window
    return max(window) if isinstance(window, list | tuple) else window


def _reformer_length(model_config: Any, max_length: int) -> int:
    """The length that a Reformer trains on: as long as its axes are, or the next that its chunks divide."""
    if model_config.axial_pos_embds:
        return math.prod(model_config.axial_pos_shape)
    chunk = math.lcm(
        *(getattr(model_config, f"{kind}_attn_chunk_length") for kind in set(model_config.attn_layers))
    )
    return math.ceil(max_length / chunk) * chunk


def _parts(model_config: Any) -> Iterator[Any]:
    """A configuration, and those inside it that are of models over a vocabulary."""
    yield model_config
    for part in vars(model_config).values():
        if isinstance(part, PreTrainedConfig) and hasattr(part, "vocab_size"):
            yield from _parts(part)


def _put_first(token_id: int, known: Any) -> Any:
    """The id, followed by the others where several were known: a text may end with one of many."""
    if not isinstance(known, list):
        return token_id
    return [token_id, *(other for other in known if other != token_id)]


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
