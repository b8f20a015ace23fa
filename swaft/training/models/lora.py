"""Puts LoRA adapters on a pretrained model, through peft."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from swaft.errors import ConfigError
from swaft.training.config import AdapterConfig
from swaft.training.config.values import split_names

TASK_TYPES = {
    "sequence classification": "SEQ_CLS",
    "question answering": "QUESTION_ANS",
    "sequence to sequence": "SEQ_2_SEQ_LM",
}
"""What peft calls the tasks of the recipes."""


def with_adapters(model: Any, settings: AdapterConfig, *, task: str) -> Any:
    """Return the model with LoRA adapters, where the settings ask for them, or as it is.

    Nothing of the pretrained model is trained then. A head that the task has added to it is, whole, and goes into
    the adapter's folder. The model is whole, and torch is seeded alike on every rank.

    Raises:
        ConfigError: peft is not installed, or finds none of the layers.
    """
    if not settings.use_peft:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"model.use_peft: needs peft: pip install 'swaft[peft]' ({error})") from error
    heads = new_heads(model) if task != "sequence to sequence" else []
    names = settings.lora_target_modules
    wanted = LoraConfig(
        task_type=TASK_TYPES[task],
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names if names in (None, "all-linear") else split_names(names),
        modules_to_save=heads or None,
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks for checkpointing by a name that transformers 5.23 has deprecated.
            warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
            return get_peft_model(model, wanted)
    except ValueError as error:
        linear = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        raise ConfigError(
            f"model.lora_target_modules: {names or 'null'} fits no layer of {type(model).__name__}; expected "
            f"all-linear, or some of {', '.join(sorted(linear))} ({' '.join(str(error).split())[:200]})"
        ) from error


def new_heads(model: Any) -> list[str]:
    """Names of the parts with weights that the task has put on the pretrained body.

    Some models have no body of one piece: embeddings, encoder and decoder lie beside the head (T5's for questions).
    """

    def is_of_the_body(part: nn.Module) -> bool:
        if model.base_model is model:
            return isinstance(part, PreTrainedModel | nn.Embedding)
        return part is model.base_model

    return [
        name
        for name, part in model.named_children()
        if not is_of_the_body(part) and any(True for _ in part.parameters())
    ]
