"""What a model must be for a noise-stability objective, checked before it trains."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.wrappers import unwrap


def generates(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder that generates text."""
    network = unwrap(model)
    return _can_generate(network) and _config(network, "is_encoder_decoder", False)


def check_model(model: nn.Module, objective: str) -> None:
    """Refuse the models that two passes and a divergence make no sense for, or fail with.

    Args:
        model: the model, wrapped or not.
        objective: the objective's name, for the message.

    Raises:
        NoiseError: for a causal language model, for regression, and for reentrant gradient checkpointing.
    """
    network = unwrap(model)
    name = type(network).__name__
    if _can_generate(network) and not _config(network, "is_encoder_decoder", False):
        raise NoiseError(
            f"{name} is a causal language model, which {objective} does not support yet; expected a "
            "classification or an encoder-decoder model. Set noise.kind=none."
        )
    if not _can_generate(network) and _config(network, "num_labels", 2) == 1:
        raise _one_class(objective)
    if any(_is_reentrant(module) for module in network.modules()):
        raise NoiseError(
            f"{name} checkpoints its activations reentrantly, which fails under DDP and ZeRO when a step has "
            f"two forward passes, as with {objective}. Expected the non-reentrant kind: set "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )


def check_output(output: Any, labels: Tensor, objective: str) -> None:
    """Refuse an output without loss and logits, logits of one class, and labels that are not one a row.

    Args:
        output: what the model returned.
        labels: the batch's labels.
        objective: the objective's name, for the message.

    Raises:
        NoiseError: naming what was found.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or getattr(output, "loss", None) is None:
        raise NoiseError(
            f"The model's output, {type(output).__name__}, lacks .loss or .logits, which {objective} needs; "
            "expected a Hugging Face classification or generation model. Set noise.kind=none."
        )
    if logits.shape[-1] == 1:
        raise _one_class(objective)
    if labels.shape != logits.shape[:-1]:
        raise NoiseError(
            f"Labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; "
            f"{objective} expects one class index a row. Set noise.kind=none for several labels a row."
        )


def _one_class(objective: str) -> NoiseError:
    return NoiseError(
        f"{objective} needs at least two classes, and the model has one output (regression), over which "
        "every softmax is 1 and the divergence 0. Set noise.kind=none."
    )


def _can_generate(network: nn.Module) -> bool:
    can_generate = getattr(network, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def _config(network: nn.Module, field: str, default: Any) -> Any:
    return getattr(getattr(network, "config", None), field, default)


def _is_reentrant(module: nn.Module) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or not isinstance(checkpoint, functools.partial):
        return False
    return bool(checkpoint.keywords.get("use_reentrant", True))  # torch's default
