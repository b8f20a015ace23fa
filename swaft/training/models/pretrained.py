"""Loads pretrained configurations, tokenizers and models; failures name the settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from swaft.errors import ConfigError
from swaft.training.config import ModelConfig, Seq2SeqModelConfig
from swaft.training.models.heads import renew_head, with_adapters
from swaft.training.models.special_tokens import COUNT_FROM_PADDING, write_token

if TYPE_CHECKING:
    from swaft.training.data.classification import Task

AnyModel = ModelConfig | Seq2SeqModelConfig

HEADS = {
    "sequence classification": AutoModelForSequenceClassification,
    "question answering": AutoModelForQuestionAnswering,
}
"""What makes a pretrained model one for a task."""
UNLIMITED = 1_000_000_000
"""Tokens that a model without absolute positions reads: as many as memory allows."""
GROWING = frozenset({"fsmt", "m2m_100", "nllb-moe", "seamless_m4t", "seamless_m4t_v2"})
"""Types that count positions from padding, and compute as many as they are asked for."""


def model_path(model: AnyModel) -> str:
    """Return the hub id or folder to load; ``demo`` is the encoder of the extra ``swaft[demo]``."""
    if model.model_name_or_path == "demo":
        from swaft.training.demo.model import demo_model_path

        return demo_model_path()
    return model.model_name_or_path or ""


def model_setting(model: AnyModel) -> str:
    """Return the setting that says which model."""
    return "model.config" if model.model_name_or_path is None else "model.model_name_or_path"


def load_model_config(model: AnyModel, **settings: Any) -> Any:
    """Return the model's transformers configuration, with entries changed as the settings say (``num_labels``).

    Raises:
        ConfigError: where there is no such model, or it brings code that was not allowed to run.
    """
    with told_as_settings(model):
        return AutoConfig.from_pretrained(
            model_path(model), trust_remote_code=model.trust_remote_code, **settings
        )


def load_tokenizer(model: AnyModel) -> Any:
    """Return the tokenizer: ``model.tokenizer_name`` where set, else the model's own.

    One without a padding token pads with its end-of-text token; the attention mask hides it either way.

    Raises:
        ConfigError: where there is none, it reads no plain text (LayoutLMv3's wants boxes), or it knows no word:
            transformers makes such a one for a folder without files of a tokenizer, and every text would be a row
            of unknown words.
    """
    with told_as_settings(model, "tokenizer_name" if model.tokenizer_name else None):
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer_name or model_path(model), trust_remote_code=model.trust_remote_code
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"model.tokenizer_name: {model.tokenizer_name or model.model_name_or_path} has no vocabulary, its "
            f"tokenizer knows {len(tokenizer)} special tokens and no word; name one that knows words"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        tokenizer("a", "a")
    except Exception as error:  # of any kind: each such tokenizer checks in its own way
        raise ConfigError(
            f"model.tokenizer_name: {type(tokenizer).__name__} does not read plain text ({_reason(error)[:200]}); "
            "use a model and a tokenizer of text alone, not of pages or tables"
        ) from error
    return tokenizer


def longest_text(model_config: Any, tokenizer: Any) -> int:
    """Return how many tokens an encoder reads: as its tokenizer says, and at most as many as it has positions."""
    return min(tokenizer.model_max_length, longest_input(model_config, tokenizer))


def longest_input(model_config: Any, tokenizer: Any, *, decoder: bool = False) -> int:
    """Return how many tokens a model has positions for; where it does not say, how many its tokenizer says.

    Args:
        model_config: transformers configuration.
        tokenizer: the model's; None: a new one.
        decoder: count those of what an encoder-decoder generates; else of what it reads.
    """
    part = half(model_config, decoder=decoder)
    own = f"max_{'decoder' if decoder else 'encoder'}_position_embeddings"
    entries = (getattr(part, name, None) for name in (own, "max_position_embeddings", "max_seq_len"))
    found = next((number for number in entries if isinstance(number, int) and number > 0), None)
    # DeBERTa's positions are relative where none are added to its input.
    by_distance = getattr(part, "relative_attention", False) and not part.position_biased_input
    if by_distance or (found is None and getattr(part, "relative_attention_num_buckets", None)):
        return UNLIMITED
    if found is None:
        return UNLIMITED if tokenizer is None else tokenizer.model_max_length
    if part.model_type not in COUNT_FROM_PADDING - GROWING:
        return found
    padding = 1 if part.model_type == "mpnet" else (part.pad_token_id or 0)
    return found - padding - 1


def half(model_config: Any, *, decoder: bool) -> Any:
    """Return the configuration of what reads, or of what writes; of a model of one piece the whole."""
    if decoder:
        return model_config.get_text_config(decoder=True)
    encoder = getattr(model_config, "encoder", None)
    return (encoder if isinstance(encoder, PreTrainedConfig) else model_config).get_text_config()


def require_question_answering(model: ModelConfig, model_config: Any) -> None:
    """Refuse a kind of model that cannot be asked for the first and the last token of an answer.

    Raises:
        ConfigError: names the kind.
    """
    brings_its_own = "AutoModelForQuestionAnswering" in (getattr(model_config, "auto_map", None) or {})
    if type(model_config) not in MODEL_FOR_QUESTION_ANSWERING_MAPPING and not brings_its_own:
        raise ConfigError(
            f"model.model_name_or_path: {model.model_name_or_path} is a {model_config.model_type}, of which "
            "transformers has no question-answering form; use an encoder (bert, roberta, distilbert, deberta, ...)"
        )


def load_with_head(
    task: str,
    model: ModelConfig,
    model_config: Any,
    *,
    seed: int,
    gradient_checkpointing: bool,
    has_new_head: bool = False,
) -> Any:
    """Return the model, with a new head where it has none, in fp32; with adapters where the settings ask for them.

    Args:
        task: ``sequence classification``, or ``question answering``: a head that points at first and last tokens.
        model: section ``model``.
        model_config: transformers configuration with the task's labels (see `describe_labels`; two for questions).
        seed: of the new head; given to torch right here, because under ZeRO-3 nothing makes the ranks' heads
            equal afterwards.
        gradient_checkpointing: recompute activations in the backward pass.
        has_new_head: the head is a new one whatever the model brings (see `fit_head`).
    """
    torch.manual_seed(seed)
    with told_as_settings(model):
        loaded = HEADS[task].from_pretrained(
            model_path(model),
            config=model_config,
            trust_remote_code=model.trust_remote_code,
            ignore_mismatched_sizes=model.ignore_mismatched_sizes or has_new_head,
            dtype="float32",
        )
    if has_new_head:
        renew_head(loaded)
    return with_adapters(with_checkpointing(loaded, gradient_checkpointing), model, task=task)


def with_checkpointing(model: Any, gradient_checkpointing: bool) -> Any:
    """Return the model, told to recompute activations in the backward pass where that is wanted.

    Non-reentrant: the reentrant form fails when a step runs the model twice, as the noise objectives do.
    """
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def describe_labels(model_config: Any, task: Task, *, pad_token_id: int | None) -> None:
    """Write the task into a transformers configuration: names of labels, kind of problem, padding."""
    names = task.label_names or [f"LABEL_{index}" for index in range(task.num_labels)]
    model_config.id2label = dict(enumerate(names))
    model_config.label2id = {name: index for index, name in enumerate(names)}
    model_config.problem_type = "regression" if task.is_regression else "single_label_classification"
    write_token(model_config, "pad", pad_token_id)


def hidden_size(model_config: Any) -> int | None:
    """Return the width of the model, where its configuration says it (for DeepSpeed's bucket sizes)."""
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return getattr(text_config, "hidden_size", None)


@contextmanager
def told_as_settings(model: AnyModel, setting: str | None = None) -> Iterator[None]:
    """Context in which what transformers raises becomes a problem with a setting; None: the model's name."""
    setting = setting or model_setting(model).removeprefix("model.")
    try:
        yield
    # The last is a value of the wrong type in the model's configuration.
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = _reason(error)
        if "trust_remote_code" in reason and not model.trust_remote_code:
            raise ConfigError(
                f"model.model_name_or_path: {model.model_name_or_path} brings Python code of its own, which "
                "is only run when asked for; read that code, then set model.trust_remote_code=true"
            ) from error
        if "ignore_mismatched_sizes" in reason:
            raise ConfigError(
                f"model.model_name_or_path: {model.model_name_or_path} has a head of another size than this task "
                "needs (see the report above); for a new head set model.ignore_mismatched_sizes=true"
            ) from error
        raise ConfigError(
            f"model.{setting}: {getattr(model, setting)} cannot be loaded: {reason[:500]}"
        ) from error


def _reason(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split())
