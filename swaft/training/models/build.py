"""Turns sections of a configuration into the objects they describe: optimizer and objective."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from swaft.errors import ConfigError, NoiseError
from swaft.noise import R3F, R4F, ObjectiveOutput, RDrop, TaskLoss
from swaft.training.config import NoiseConfig, TrainConfig
from swaft.training.config.values import chosen_options

_KINDS: dict[str, type] = {"none": TaskLoss, "rdrop": RDrop, "r3f": R3F, "r4f": R4F}
_NAMES = "weight|preset|noise|sigma|masks|reduction|detach|passes|fused|layers"


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, without decay on biases and normalisation weights.

    Those are the parameters of fewer than two dimensions.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if len(whole_shape(p)) >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if len(whole_shape(p)) < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
    )


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter; one that ZeRO-3 has partitioned shows itself as empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


class ParameterCount(NamedTuple):
    """How many elements a whole model has."""

    trainable: int
    """Those that are trained."""
    total: int
    """All."""

    def __str__(self) -> str:
        """Write it as `1,024`, or `1,024 of 65,536 (1.56%)` where some are frozen."""
        if self.trainable == self.total:
            return f"{self.total:,}"
        return f"{self.trainable:,} of {self.total:,} ({self.trainable / self.total:.2%})"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the elements of the whole model."""
    sizes = [(whole_shape(parameter).numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def build_objective(noise: NoiseConfig, *, seed: int, label_smoothing: float = 0.0) -> R3F | RDrop | TaskLoss:
    """Return the training objective.

    Args:
        noise: section ``noise``; a null option leaves the choice to the preset.
        seed: seed of the noise.
        label_smoothing: share of the task loss's target that is spread over all classes.

    Raises:
        ConfigError: where an option is set that the objective would not use.
    """
    kind = _KINDS[noise.kind]
    options = chosen_options(noise, kind, f"noise.kind={noise.kind}")
    named: Any = type(kind.__name__, (_NamesSettings, kind), {})
    if kind is not TaskLoss:
        options |= {"weight": noise.weight, "seed": seed}
    with settings_named():
        return named(label_smoothing=label_smoothing, **options)


class _NamesSettings:
    """Before an objective's class: its errors name the settings that its arguments come from."""

    def prepare_model(self, model: nn.Module) -> None:
        with settings_named():
            super().prepare_model(model)  # type: ignore[misc]

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> ObjectiveOutput:
        with settings_named():
            return super().__call__(model, batch)  # type: ignore[misc, no-any-return]


@contextmanager
def settings_named() -> Iterator[None]:
    """Raise errors of `swaft.noise` in the words of section ``noise``."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([in_settings(problem) for problem in error.problems]) from error
    except NoiseError as error:
        raise NoiseError(in_settings(str(error))) from error


def in_settings(message: str) -> str:
    """Name the settings of section ``noise`` for the arguments and classes of `swaft.noise` in a message."""
    for name, kind in _KINDS.items():
        message = re.sub(rf"\bswaft\.{kind.__name__}\b", f"noise.kind={name}", message)
    message = re.sub(rf"^({_NAMES}) is ", r"noise.\1 is ", message)
    return re.sub(
        rf"(?<![\w.])({_NAMES})=(?:'(\w+)'|(True|False)|)",
        lambda m: f"noise.{m[1]}={m[2] or (m[3] or '').lower()}",
        message,
    )
