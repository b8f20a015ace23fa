"""The model and a full batch of a recipe, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.initialization import no_init_weights

from swaft.training.config.causal_lm import CausalConfig
from swaft.training.config.question_answering import QuestionAnsweringConfig
from swaft.training.config.seq2seq import Seq2SeqConfig
from swaft.training.models.pretrained import naming_settings, with_adapters


@dataclass(frozen=True)
class PlannedModel:
    """What one micro-batch is made of."""

    build: Callable[[], Any]
    """Makes the model, fp32, with whatever weights."""
    batch: Callable[[], dict[str, Tensor]]
    """Makes a batch in which every row is as long as the settings allow."""


def planned_model(config: Any, model_config: Any) -> PlannedModel:
    """Return how to make a recipe's model and its longest batch.

    Args:
        config: a recipe's configuration.
        model_config: the model's, as transformers has it.
    """
    rows = config.train.per_device_train_batch_size
    if isinstance(config, CausalConfig):
        if config.model.config is not None:
            _stand_in_for_tokenizer(model_config, config)
        length, kind, task = config.data.max_length, AutoModelForCausalLM, "causal language modelling"
        model_config.use_cache = False
        labels = {"labels": (rows, length)}
    elif isinstance(config, Seq2SeqConfig):
        if config.model.config is not None:
            _stand_in_for_tokenizer(model_config, config)
        length, kind, task = config.data.max_source_length, AutoModelForSeq2SeqLM, "sequence to sequence"
        labels = {"labels": (rows, config.data.max_target_length)}
    else:
        length = config.data.max_seq_length
        if isinstance(config, QuestionAnsweringConfig):
            kind, task = AutoModelForQuestionAnswering, "question answering"
            labels = {"start_positions": (rows,), "end_positions": (rows,)}
        else:
            kind, task = AutoModelForSequenceClassification, "sequence classification"
            labels = {"labels": (rows,)}
            if getattr(model_config, "pad_token_id", None) is None:
                model_config.pad_token_id = 0  # the tokenizer's in a run; any number takes as much memory

    def build() -> Any:
        # Some draw their weights by looking at them, which tensors without data do not bear (vision towers).
        with naming_settings(config.model), no_init_weights():
            model = kind.from_config(
                model_config, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
            )
        model.tie_weights()  # which belongs to what was left out
        # Without data no adapter can be moved to its layer, and a copied head would bring a copy of the mode.
        with (
            patch.object(nn.Module, "to", lambda module, *_, **__: module),
            patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True),
        ):
            return with_adapters(model, config.model, task=task)

    def batch() -> dict[str, Tensor]:
        shapes = {"input_ids": (rows, length), "attention_mask": (rows, length)} | labels
        return {name: torch.ones(shape, dtype=torch.int64) for name, shape in shapes.items()}

    return PlannedModel(build, batch)


def _stand_in_for_tokenizer(model_config: Any, config: CausalConfig | Seq2SeqConfig) -> None:
    """Give a new model the special tokens, and the most tokens, that its tokenizer will have."""
    said = config.model.config or {}
    fitted = {
        "vocab_size": config.model.most_tokens,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    model_config.update({name: value for name, value in fitted.items() if name not in said})
