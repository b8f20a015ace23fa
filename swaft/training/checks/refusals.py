"""What every run refuses before it starts, whatever its task."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from swaft.errors import ConfigError
from swaft.training.checks.problems import Problems
from swaft.training.checks.recipe import Prepared
from swaft.training.config import Seq2SeqModelConfig
from swaft.training.models.encoder_decoder import VOCAB_SIZE
from swaft.training.models.pretrained import AnyModel, half, model_path, model_setting
from swaft.training.models.special_tokens import follow_tokenizer, knows_languages

logger = logging.getLogger(__name__)

WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""The files of which a model's folder has one."""
ADAPTER = "adapter_config.json"
"""In the folder of an adapter, which names the model that it belongs to."""

NOT_FROM_TEXT = {
    "fsmt": "makes its decoder's input of the source instead of the target",
    "layoutlmv2": "reads pictures of pages beside their text",
    "lxmert": "answers questions about pictures",
    "prophetnet": "shows its decoder tokens that it has still to write, by a fault of transformers",
    "tapas": "answers questions about tables",
}
"""Types of models that rows of text alone do not train, and why."""
ROUTE_AMONG_MODULES = frozenset({"nllb-moe", "switch_transformers"})
"""Types of mixtures of experts that run a module for each expert that some token chose, and no other."""
START_WITH_THE_END = frozenset({"mbart", "plbart"})
"""Types whose decoder starts with the last token of the text that it is to write, a language say."""
START_WITH_BOS = frozenset({"t5gemma", "t5gemma2"})
"""Types whose decoder starts with its bos_token_id."""


def refuse_compilation(environ: Mapping[str, str]) -> None:
    """Refuse a launch that has accelerate compile the model.

    Args:
        environ: what the launcher left, or would leave.

    Raises:
        ConfigError: as said.
    """
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if backend != "NO":
        raise ConfigError(
            f"the launcher asks for dynamo_backend {backend}, and the recipes do not compile: hooks and borrowed "
            "heads would break the graph at every step; remove dynamo_config from the accelerate configuration "
            "(and --dynamo_backend from the line)"
        )


def refuse_parallelism(environ: Mapping[str, str]) -> None:
    """Refuse a launch that splits a batch, or a layer, over ranks.

    Args:
        environ: what the launcher left, or would leave.

    Raises:
        ConfigError: as said.
    """
    if environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() not in ("false", ""):
        raise ConfigError(
            "the launcher asks for parallelism_config, and in the recipes every rank trains on rows of its own, "
            "with weights sharded over all ranks or none; remove it from the accelerate configuration"
        )


def refuse_routing(environ: Mapping[str, str], model_config: Any) -> None:
    """Refuse a mixture of experts that are modules of their own on several ranks: each would run others of them.

    Args:
        environ: what the launcher left, or would leave.
        model_config: transformers configuration.

    Raises:
        ConfigError: as said.
    """
    if _is_one_of_several(environ) and model_config.model_type in ROUTE_AMONG_MODULES:
        raise ConfigError(
            f"the launcher starts {environ['WORLD_SIZE']} ranks, and the experts of a {model_config.model_type} "
            "are modules of which each rank runs those that its tokens choose, so the ranks would wait for each "
            "other; set num_processes: 1, or use a model that keeps its experts in one tensor (Mixtral, Qwen, ...)"
        )


def keep_all_layers(environ: Mapping[str, str], model_config: Any) -> None:
    """On several ranks leave out no layers, and log it: each would leave out others, and wait for their gradients.

    Args:
        environ: what the launcher left, or would leave.
        model_config: transformers configuration, whose rates become 0 (M2M100 has 0.05).
    """
    if not _is_one_of_several(environ):
        return
    for part in (model_config, *vars(model_config).values()):
        rates = vars(part).items() if isinstance(part, PreTrainedConfig) else ()
        for name in [name for name, rate in rates if name.endswith("layerdrop") and rate]:
            logger.info(
                "%s=%g is set to 0: ranks would leave out different layers", name, getattr(part, name)
            )
            setattr(part, name, 0.0)


def _is_one_of_several(environ: Mapping[str, str]) -> bool:
    return int(environ.get("WORLD_SIZE", "1")) > 1


def check_model(ready: Prepared, config: Any, problems: Problems) -> None:
    """Put on the list what no recipe trains with, of the model and of the tokenizer beside it.

    Args:
        ready: with ``model_config``, which takes the tokenizer's word on special tokens, and ``tokenizer``.
        config: the recipe's configuration.
        problems: the list.
    """
    with problems:
        if ready.tokenizer is not None:
            follow_tokenizer(ready.model_config, ready.tokenizer)
    for require in (require_weights, require_text):
        with problems:
            require(config.model, ready.model_config)
    for require in (require_embeddings, require_decoder_start):
        with problems:
            require(config.model, ready.model_config, ready.tokenizer)


def require_weights(model: AnyModel, model_config: object) -> None:
    """Refuse a folder of a pretrained model without weights; of the hub it is seen when they are fetched.

    Args:
        model: section ``model``.
        model_config: its transformers configuration.

    Raises:
        ConfigError: as said.
    """
    if isinstance(model, Seq2SeqModelConfig) and model.config is not None:
        return
    folder = Path(model_path(model))
    named = getattr(model_config, "transformers_weights", None)
    expected = (*WEIGHTS, ADAPTER) if named is None else (named,)
    if folder.is_dir() and not any((folder / name).is_file() for name in expected):
        raise ConfigError(
            f"model.model_name_or_path: {model.model_name_or_path} has a configuration and no weights; expected "
            f"{' or '.join((named,) if named else (SAFE_WEIGHTS_NAME, WEIGHTS_NAME))} in that folder"
        )


def require_text(model: AnyModel, model_config: Any) -> None:
    """Refuse a model that rows of text alone do not train.

    Args:
        model: section ``model``.
        model_config: its transformers configuration.

    Raises:
        ConfigError: as said.
    """
    reason = NOT_FROM_TEXT.get(model_config.model_type)
    if reason is not None:
        raise ConfigError(
            f"{model_setting(model)}: a {model_config.model_type} {reason}, so rows of text alone do not train it; "
            "use another model"
        )


def require_embeddings(model: AnyModel, model_config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that makes tokens of texts, or pads with one, that the model has no embedding for.

    Args:
        model: section ``model``.
        model_config: its transformers configuration.
        tokenizer: the one that is used, after `read_as_text`. None: a new one is trained, with ``model.vocab_size``
            tokens at most.

    Raises:
        ConfigError: with both numbers.
    """
    if isinstance(model, Seq2SeqModelConfig) and model.config is not None:
        described = model.config
        tables = (described, *(part for part in described.values() if isinstance(part, dict)))
        known = [table.get(name) for table in tables for name in ("vocab_size", "decoder_vocab_size")]
    else:
        parts = (model_config, half(model_config, decoder=False), half(model_config, decoder=True))
        known = [getattr(part, "vocab_size", None) for part in parts]
    rows = min((number for number in known if isinstance(number, int)), default=None)
    if rows is None:
        return  # one that hashes characters; one that is made as large as its tokenizer
    if tokenizer is None:
        most = getattr(model, "vocab_size", None) or VOCAB_SIZE
        if most > rows:
            raise ConfigError(
                f"model.config: vocab_size is {rows}, but the new tokenizer may have {most} tokens; leave it out, "
                "or set model.vocab_size to as many"
            )
        return
    # Special tokens that nothing puts into a text need no embedding (Gemma 3 has one for pictures).
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
        raise ConfigError(
            f"{model_setting(model)}: the model has {rows} embeddings, but the tokenizer has {len(tokenizer)} "
            f"tokens ({without[min(without)]!r} is the first without one); expected as many at least. Use the "
            "model's own tokenizer, or call resize_token_embeddings and save both"
            + (
                ""
                if tokenizer.split_special_tokens
                else ". With data.split_special_tokens=false a text may have each special token"
            )
        )


def require_token_types(model: AnyModel, model_config: Any, tokenizer: Any, columns: Sequence[str]) -> None:
    """Refuse a tokenizer that tells the texts of a row apart by more types than the model has embeddings for.

    Args:
        model: section ``model``.
        model_config: its transformers configuration.
        tokenizer: the one that is used.
        columns: with the texts of a row, one or two.

    Raises:
        ConfigError: with both numbers.
    """
    rows = getattr(model_config.get_text_config(), "type_vocab_size", None) or 0
    types = max(tokenizer(*("a" for _ in columns)).get("token_type_ids", [0])) + 1
    if 0 < rows < types:
        raise ConfigError(
            f"{model_setting(model)}: the model has {rows} embeddings for types of tokens, but the tokenizer tells "
            f"{types} apart; use the model's own tokenizer, or leave token_type_ids out of "
            "model_input_names in tokenizer_config.json"
        )


def require_decoder_start(model: AnyModel, model_config: Any, tokenizer: Any) -> None:
    """Refuse an encoder-decoder that does not know what its decoder starts with.

    Args:
        model: section ``model``.
        model_config: its transformers configuration.
        tokenizer: the one that is used; None: a new one.

    Raises:
        ConfigError: as said.
    """
    if not model_config.is_encoder_decoder or model_config.model_type in NOT_FROM_TEXT:
        return
    generates = isinstance(model, Seq2SeqModelConfig)
    if model_config.model_type in START_WITH_THE_END and (not generates or knows_languages(tokenizer)):
        return
    start = getattr(model_config, "decoder_start_token_id", None)
    if model_config.model_type in START_WITH_BOS:
        start = model_config.get_text_config(decoder=True).bos_token_id
    elif generates and model.config is not None:
        start = model.config.get(
            "decoder_start_token_id", 0
        )  # the tokenizer's padding, where nothing is said
    elif generates and start is None:
        with suppress(OSError):  # a folder without generation settings
            start = GenerationConfig.from_pretrained(model_path(model)).decoder_start_token_id
    if start is None:
        raise ConfigError(
            f"{model_setting(model)}: the model has no decoder_start_token_id, so its decoder has nothing to start "
            "with; set it in the model's config.json (T5: its pad_token_id, BART: its eos_token_id), or in "
            "model.config"
        )
