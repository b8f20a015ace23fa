"""The model and a full batch of a recipe, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.initialization import no_init_weights

from swaft.training.config import QuestionAnsweringConfig, Seq2SeqConfig
from swaft.training.models.encoder_decoder import VOCAB_SIZE
from swaft.training.models.lora import with_adapters
from swaft.training.models.pretrained import told_as_settings


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What one micro-batch is made of."""

    build: Callable[[], Any]
    """Makes the model, fp32, with whatever weights."""
    batch: Callable[[], dict[str, Tensor]]
    """Makes a batch in which every row is as long as the settings allow."""
    rows: int
    """Of the batch."""
    lengths: tuple[int, ...]
    """Tokens of a row; of a source and a target where the model writes."""


def planned_model(config: Any, model_config: Any) -> Planned:
    """Return how to make a recipe's model and its longest batch.

    Args:
        config: a recipe's configuration.
        model_config: the model's, as transformers has it.
    """
    rows = config.train.per_device_train_batch_size
    if isinstance(config, Seq2SeqConfig):
        if config.model.config is not None:
            _stand_in_for_tokenizer(model_config, config)
        lengths = (config.data.max_source_length, config.data.max_target_length)
        kind, task = AutoModelForSeq2SeqLM, "sequence to sequence"
        labels = {"labels": (rows, lengths[1])}
    else:
        lengths = (config.data.max_seq_length,)
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
        with told_as_settings(config.model), no_init_weights():
            model = kind.from_config(
                model_config, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
            )
        model.tie_weights()  # which belongs to what was left out
        with _on_paper():
            return with_adapters(model, config.model, task=task)

    def batch() -> dict[str, Tensor]:
        shapes = {"input_ids": (rows, lengths[0]), "attention_mask": (rows, lengths[0])} | labels
        return {name: torch.ones(shape, dtype=torch.int64) for name, shape in shapes.items()}

    return Planned(build=build, batch=batch, rows=rows, lengths=lengths)


@contextmanager
def _on_paper() -> Iterator[None]:
    """Context in which peft can put adapters on tensors without data.

    It moves each adapter to its layer, which such tensors cannot be; and the copy that it makes of a head would get
    a copy of the mode that its tensors belong to.
    """
    to = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign]
    FakeTensorMode.__deepcopy__ = lambda mode, _: mode  # type: ignore[attr-defined]
    try:
        yield
    finally:
        nn.Module.to = to
        del FakeTensorMode.__deepcopy__  # type: ignore[attr-defined]


def _stand_in_for_tokenizer(model_config: Any, config: Seq2SeqConfig) -> None:
    """Give a new model the special tokens, and the most tokens, that its tokenizer will have."""
    said = config.model.config or {}
    fitted = {
        "vocab_size": config.model.vocab_size or VOCAB_SIZE,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    for name, value in fitted.items():
        if name not in said:
            setattr(model_config, name, value)
