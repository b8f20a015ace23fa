"""Turns sections of a configuration into the objects they describe: optimizer and objective."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn

from swaft.errors import ConfigError
from swaft.noise import R3F, R4F, RDrop, TaskLoss
from swaft.training.config import NoiseConfig, TrainConfig
from swaft.training.config.words import in_settings

PASS_OPTIONS = ("passes", "fused")
R3F_OPTIONS = ("preset", "noise", "sigma", "masks", "reduction", "detach", *PASS_OPTIONS)
NOISE_OPTIONS = {
    "none": (),
    "rdrop": ("preset", *PASS_OPTIONS),
    "r3f": R3F_OPTIONS,
    "r4f": (*R3F_OPTIONS, "layers"),
}
"""Options of section ``noise`` that each kind uses, beside its weight."""


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
    known = NOISE_OPTIONS["r4f"]
    options = {name: value for name in known if (value := getattr(noise, name)) is not None}
    problems = [
        f"noise.{name} is {value}, which noise.kind={noise.kind} does not use; remove it"
        for name, value in options.items()
        if name not in NOISE_OPTIONS[noise.kind]
    ]
    if problems:
        raise ConfigError(problems)
    if noise.kind == "none":
        return TaskLoss(label_smoothing)
    objective = {"r3f": R3F, "r4f": R4F, "rdrop": RDrop}[noise.kind]
    try:
        return objective(weight=noise.weight, seed=seed, label_smoothing=label_smoothing, **options)
    except ConfigError as error:
        raise ConfigError(
            [in_settings(re.sub(r"^(\w+) is ", r"noise.\1 is ", p)) for p in error.problems]
        ) from error
