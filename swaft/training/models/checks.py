"""Refuses models and tokenizers that cannot be trained on rows of text, or do not fit each other.

``model`` is that section of the settings, ``model_config`` its transformers configuration, and ``tokenizer`` is
the one that is used, after `read_as_text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from swaft.errors import ConfigError
from swaft.soup.huggingface import ADAPTER_CONFIG
from swaft.training.checks import Prepared, Problems
from swaft.training.config import AnyModelConfig, RecipeConfig
from swaft.training.models.pretrained import form_of, half, model_path
from swaft.training.models.special_tokens import follow_tokenizer

WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""Weight files, of which a model's folder has one."""

NOT_FROM_TEXT = {
    "fsmt": "makes its decoder's input from the source instead of the target",
    "layoutlmv2": "reads images of pages along with their text",
    "lxmert": "answers questions about images",
    "prophetnet": "shows its decoder tokens that it has yet to generate, because of a bug in transformers",
    "tapas": "answers questions about tables",
}
"""Types of models that cannot be trained on rows of text alone, and why."""
RECURRENT = frozenset({"rwkv"})
"""Types of decoders that carry a state from token to token, and cannot be measured on the host: they rescale their
weights there."""
START_WITH_THE_END = frozenset({"mbart", "plbart"})
"""Types whose decoder starts with the last token of the target, such as a language code."""
START_WITH_BOS = frozenset({"t5gemma", "t5gemma2"})
"""Types whose decoder starts with its bos_token_id."""


def check_model(ready: Prepared, config: RecipeConfig, problems: Problems) -> None:
    """Put on the list whatever keeps the model or its tokenizer from being trained by a recipe.

    Args:
        ready: with ``model_config``, whose special tokens become the tokenizer's, and ``tokenizer``; None: a new
            one is trained.
        config: the recipe's configuration.
        problems: the list.
    """
    with problems:
        if ready.tokenizer is not None:
            follow_tokenizer(ready.model_config, ready.tokenizer)
    for require in (require_weights, require_text):
        with problems:
            require(config.model, ready.model_config)
    with problems:
        require_form(config.model, ready.model_config, config.task)
    with problems:
        if ready.tokenizer is not None:
            require_embeddings(config.model, ready.model_config, ready.tokenizer)


def require_weights(model: AnyModelConfig, model_config: object) -> None:
    """Refuse a folder of a pretrained model without weights; a model from the hub is checked by the download.

    Raises:
        ConfigError: the folder has no weights.
    """
    if model.described is not None:
        return
    folder = Path(model_path(model))
    named = getattr(model_config, "transformers_weights", None)
    expected = (*WEIGHTS, ADAPTER_CONFIG) if named is None else (named,)
    if folder.is_dir() and not any((folder / name).is_file() for name in expected):
        raise ConfigError(
            f"model.model_name_or_path: {model.model_name_or_path} has a configuration but no weights; expected "
            f"{' or '.join((named,) if named else (SAFE_WEIGHTS_NAME, WEIGHTS_NAME))} in that folder"
        )


def require_separate_rows(config: Any, model_config: Any) -> None:
    """Refuse to pack rows if they would see each other, or if `require_order` cannot measure whether they do.

    Raises:
        ConfigError: names the model's type, or the setting that separates the rows.
    """
    if not config.data.packing:
        return
    kind, own_code = model_config.model_type, getattr(model_config, "auto_map", None)
    if kind in RECURRENT or (own_code and config.model.trust_remote_code):
        reason = "it is recurrent" if kind in RECURRENT else "its code is its own, and is not tested"
        raise ConfigError(
            f"data.packing: packed rows of {kind} may see each other ({reason}); set it to false"
        )
    size = config.train.per_device_train_batch_size
    if attends_by_flash(model_config) and (size > 1 or config.noise.passes == "doubled"):
        attention = model_config._attn_implementation
        raise ConfigError(
            f"data.packing: with {attention} transformers keeps packed rows apart only if the model gets them one "
            "at a time; set train.per_device_train_batch_size=1 (with a longer data.max_length, or more "
            "train.gradient_accumulation_steps) and noise.passes=two"
        )


def attends_by_flash(model_config: Any) -> bool:
    """Whether a model computes its attention in kernels that only run on a GPU."""
    return "flash" in str(model_config._attn_implementation)


@torch.no_grad()
def require_order(model: Any, setting: str, *, packs: bool) -> None:
    """Refuse a decoder in which a token sees later ones, or (``packs``) those of a row packed before its own.

    Measured on eight tokens in fp32: relative to the largest, the logits of small causal models of transformers
    differ by at most 5e-7. Those of others differ by 3e-3 or more, but for packed rows of LFM2, whose short
    convolutions let through as little as 1e-4: so close to the limit, weights decide on which side they are.

    Not measured are models of which ZeRO-3 has loaded shards, and those that cannot run on the host, or not without
    changing: `require_separate_rows` decides for them.

    Args:
        model: on the host, with random or pretrained weights.
        setting: the setting that names the model, for the message.
        packs: whether rows will be packed.

    Raises:
        ConfigError: tokens see what they must not see.
    """
    was_training, kind = model.training, model.config.model_type
    is_whole = not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    has_own_code = not type(model).__module__.startswith("transformers.")
    if not is_whole or has_own_code or kind in RECURRENT or attends_by_flash(model.config):
        return
    ids = (torch.arange(3, 11) % model.get_input_embeddings().num_embeddings)[None]
    model.eval()

    def logits(ids: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, **others).logits

    pairs = [(logits(ids)[:, :4], logits(ids[:, :4]), f"tokens of {kind} see later ones; expected a decoder")]
    if packs:
        packed = logits(ids, position_ids=torch.arange(8)[None] % 4)[:, 4:]
        pairs.append(
            (packed, logits(ids[:, 4:]), f"packed rows of {kind} see each other; set data.packing=false")
        )
    model.train(was_training)
    for found, alone, problem in pairs:
        if (found - alone).abs().max() > 1e-4 * alone.abs().max():
            raise ConfigError(f"{setting}: {problem}")


def require_text(model: AnyModelConfig, model_config: Any) -> None:
    """Refuse a model that cannot be trained on rows of text alone.

    Raises:
        ConfigError: names the type of the model and the reason.
    """
    reason = NOT_FROM_TEXT.get(model_config.model_type)
    if reason is not None:
        raise ConfigError(
            f"{model.setting}: a {model_config.model_type} {reason}, so rows of text alone do not train it; "
            "use another model"
        )


def require_form(model: AnyModelConfig, model_config: Any, task: str) -> None:
    """Refuse a type of model that has no form for a task, neither in transformers nor in its own code.

    Raises:
        ConfigError: names the type and the task; or the tasks there are, if this is none of them.
    """
    auto, _, has_head = form_of(task)
    brings_its_own = auto.__name__ in (getattr(model_config, "auto_map", None) or {})
    if type(model_config) not in auto._model_mapping and not brings_its_own:
        part: Any = getattr(model_config, "text_config", None)
        if type(part) in auto._model_mapping:
            raise ConfigError(
                f"{model.setting}: a {model_config.model_type} also reads images or sound; expected a model of "
                f"text alone. Save its text model, a {part.model_type}, in a folder of its own, and name that"
            )
        usual = "an encoder (bert, roberta, distilbert, deberta, ...)" if has_head else "another model"
        raise ConfigError(
            f"{model.setting}: a {model_config.model_type} has no form for {task} in transformers; use {usual}"
        )


def require_embeddings(model: AnyModelConfig, model_config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens, from texts or padding, that the model has no embedding for.

    Raises:
        ConfigError: with both numbers.
    """
    rows = embedding_rows(model_config if model.described is None else model.described)
    if rows is None:
        return  # a model that hashes characters, or one that is made as large as its tokenizer
    # Special tokens that nothing puts into a text need no embedding (Gemma 3 has one for images).
    special = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and tokenizer.split_special_tokens
    }
    special -= {*tokenizer("a", "a").input_ids, *tokenizer(text_target="a").input_ids, tokenizer.pad_token_id}
    without = {
        token_id: token
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= rows and token_id not in special
    }
    if without:
        meaning = ". With data.split_special_tokens=false a text may contain any special token"
        raise ConfigError(
            f"{model.setting}: the model has {rows} embeddings, but the tokenizer has {len(tokenizer)} "
            f"tokens ({without[min(without)]!r} is the first without one); expected at least as many. Use the "
            "model's own tokenizer, or call resize_token_embeddings and save both"
            + ("" if tokenizer.split_special_tokens else meaning)
        )


def require_embedded(rows: Iterable[Dataset], model: AnyModelConfig, model_config: Any) -> None:
    """Refuse rows with token ids that the model has no embedding for, such as those a chat template adds.

    Raises:
        ConfigError: with both numbers.
    """
    known = embedding_rows(model_config if model.described is None else model.described)
    chunks = [chunk for split in rows for chunk in split.data.column("input_ids").chunks]
    most = max((chunk.flatten().to_numpy().max(initial=0) for chunk in chunks), default=0)
    if known is not None and most >= known:
        raise ConfigError(
            f"{model.setting}: the model has {known} embeddings, but the rows have the token id {most}; use the "
            "model's own tokenizer, or call resize_token_embeddings and save both"
        )


def embedding_rows(described: Any) -> int | None:
    """Return how many tokens a model has embeddings for, the minimum over its parts; None: not specified.

    Args:
        described: its transformers configuration, or entries of one.
    """

    def sizes() -> Iterator[Any]:
        if isinstance(described, dict):
            for table in (described, *(part for part in described.values() if isinstance(part, dict))):
                yield from (table.get(name) for name in ("vocab_size", "decoder_vocab_size"))
            return
        for part in (described, half(described, decoder=False), half(described, decoder=True)):
            yield getattr(part, "vocab_size", None)

    return min((size for size in sizes() if isinstance(size, int)), default=None)


def require_token_types(
    model: AnyModelConfig, model_config: Any, tokenizer: Any, columns: Sequence[str]
) -> None:
    """Refuse a tokenizer that uses more token types for the texts of a row than the model has embeddings for.

    Raises:
        ConfigError: with both numbers.
    """
    rows = getattr(model_config.get_text_config(), "type_vocab_size", None) or 0
    types = max(tokenizer(*("a" for _ in columns)).get("token_type_ids", [0])) + 1
    if 0 < rows < types:
        raise ConfigError(
            f"{model.setting}: the model has {rows} embeddings for token types, but the tokenizer uses "
            f"{types}; use the model's own tokenizer, or leave token_type_ids out of "
            "model_input_names in tokenizer_config.json"
        )


def require_decoder_start(
    model: AnyModelConfig, model_config: Any, *, start: int | None = None, may_start_with_end: bool = True
) -> None:
    """Refuse an encoder-decoder whose decoder has no start token.

    Args:
        model: section ``model``.
        model_config: its transformers configuration.
        start: the start token to use if its configuration has none.
        may_start_with_end: whether targets end with a token that the decoder may start with.

    Raises:
        ConfigError: there is no start token.
    """
    kind = model_config.model_type
    if not model_config.is_encoder_decoder or kind in NOT_FROM_TEXT:
        return
    if kind in START_WITH_BOS:
        start = model_config.get_text_config(decoder=True).bos_token_id
    elif start is None:
        start = getattr(model_config, "decoder_start_token_id", None)
    if start is None and not (kind in START_WITH_THE_END and may_start_with_end):
        raise ConfigError(
            f"{model.setting}: the model has no decoder_start_token_id, so its decoder has nothing to start "
            "with; set it in the model's config.json (T5: its pad_token_id, BART: its eos_token_id), or in "
            "model.config"
        )
