"""Turns sections of a configuration into the objects they describe: optimizer, objective, schedule.

The learning rate is a pure function of how many optimizer steps have been applied. There is no scheduler object:
accelerate would step one ``num_processes`` times per optimizer step, and a skipped step would need its own
bookkeeping. The shapes, and the rate of zero in the first warmup step, are the same as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from swaft.errors import ConfigError
from swaft.fraction import share_of
from swaft.noise import R3F, RDrop, TaskLoss
from swaft.noise.objectives import TwoPasses
from swaft.training.config import NoiseConfig, TrainConfig
from swaft.training.config.schema import NOISE_KINDS
from swaft.training.config.values import chosen_options, settings_of


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, without decay on biases and normalisation weights.

    Those are the parameters with fewer than two dimensions and, as in transformers, those with "bias" in their name
    (T5's ``relative_attention_bias`` is a matrix).
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decays = {name for name, p in trainable if len(whole_shape(p)) >= 2 and "bias" not in name.lower()}
    groups = [
        {"params": [p for name, p in trainable if name in decays], "weight_decay": train.weight_decay},
        {"params": [p for name, p in trainable if name not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
    )


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter; one that ZeRO-3 has partitioned looks empty itself."""
    return getattr(parameter, "ds_shape", parameter.shape)


class ParameterCount(NamedTuple):
    """How many elements a whole model has."""

    trainable: int
    """Elements that are trained."""
    total: int
    """All elements."""

    def __str__(self) -> str:
        """Write it as `1,024`, or `1,024 of 65,536 (1.56%)` if some are frozen."""
        if self.trainable == self.total:
            return f"{self.total:,}"
        return f"{self.trainable:,} of {self.total:,} ({self.trainable / self.total:.2%})"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the elements of the whole model."""
    sizes = [(whole_shape(parameter).numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def require_own_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer with parameters outside of the model, such as a loss's, which no checkpoint would hold.

    Raises:
        ConfigError: with their number.
    """
    own = {id(parameter) for parameter in model.parameters()}
    others = [each for group in optimizer.param_groups for each in group["params"] if id(each) not in own]
    if others:
        raise ConfigError(
            f"the optimizer has {len(others)} parameters that are not the model's, expected none: a run's "
            "checkpoints hold only the model's. Make them part of the model (a loss: one of its modules)"
        )


def noise_facts(objective: Any, model: nn.Module) -> dict[str, Any]:
    """Return kind, weight and `NoiseSettings` of an objective as plain values; kind ``none`` if it has one pass.

    Args:
        objective: what `build_objective` made, or a recipe's own.
        model: whose task decides what a preset stands for.
    """
    if not isinstance(objective, TwoPasses):
        return {"kind": "none"}
    kind = type(objective).__name__.lower()
    return {"kind": kind, "weight": objective.weight} | asdict(objective.settings_for(model))


def noise_in_words(facts: Mapping[str, Any]) -> str:
    """Return what `noise_facts` found as one line."""
    if facts["kind"] == "none":
        return "none"
    size = f"{facts['sigma']:g}" + (" of the embeddings' RMS" if facts["relative"] else "")
    drawn = f"{facts['noise']} {size} on the embeddings" if facts["sigma"] else "two dropout masks"
    forwards = "2 forwards" if facts["passes"] == "two" else "1 forward of twice the rows"
    return f"{facts['kind']}, {drawn}, weight {facts['weight']:g} -> {forwards} per micro-batch"


def build_objective(noise: NoiseConfig, *, seed: int, label_smoothing: float = 0.0) -> R3F | RDrop | TaskLoss:
    """Return the training objective.

    Args:
        noise: section ``noise``; a null option leaves the choice to the preset.
        seed: seed of the noise.
        label_smoothing: share of the task loss's target that is spread over all classes.

    Raises:
        ConfigError: an option is set that the objective would not use, or options contradict each other.
    """
    kind = None if noise.kind == "none" else NOISE_KINDS[noise.kind]
    options = chosen_options(noise, kind)
    with settings_of("noise"):
        if kind is None:
            return TaskLoss(label_smoothing=label_smoothing)
        return kind(label_smoothing=label_smoothing, weight=noise.weight, seed=seed, **options)


def require_called(objective: Any) -> None:
    """Refuse a noise objective that the steps so far have not called: a recipe of one's own computes another loss.

    Raises:
        ConfigError: on every rank, since all run the same loop.
    """
    if isinstance(objective, TwoPasses) and objective.step == 0:
        raise ConfigError(
            f"noise.kind is {type(objective).__name__.lower()}, but the first step did not call its objective, so "
            "the run would train without it; set noise.kind=none, or take the loss from objective(model, batch)"
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate of every optimizer step of a run.

    With ``s`` applied steps, ``w`` warmup steps and ``T`` steps in total, the rate is ``peak`` times

        s / w                                   while s < w (not for ``constant``),
        1                                       for ``constant`` and ``constant_with_warmup``,
        (T - s) / (T - w)                       for ``linear``,
        (1 + cos(pi * (s - w) / (T - w))) / 2   for ``cosine``.
    """

    kind: str
    """Shape after the warmup: ``linear``, ``cosine``, ``constant_with_warmup`` or ``constant``."""
    peak: float
    """Rate at the end of the warmup."""
    warmup_steps: int
    """Optimizer steps until ``peak`` is reached; 0 for ``constant``."""
    total_steps: int
    """Optimizer steps of the run."""

    def __call__(self, applied_steps: int) -> float:
        """Return the rate of the step after this many applied steps; steps skipped for overflow do not count."""
        return self.peak * self._share(applied_steps)

    def __str__(self) -> str:
        """Write it for the banner of a run."""
        return f"{self.peak:g} {self.kind}, {self.warmup_steps} warmup steps"

    def _share(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.kind.startswith("constant"):
            return 1.0
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return max(0.0, (self.total_steps - step) / decay_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - self.warmup_steps) / decay_steps))))


def build_schedule(train: TrainConfig, *, total_steps: int, averaging: bool) -> Schedule:
    """Return the schedule that a run asks for.

    Args:
        train: section ``train`` of the configuration.
        total_steps: optimizer steps of the run.
        averaging: whether weights are averaged. ``auto`` is then constant after warmup, because a rate that
            decays to zero leaves averaging nothing to average; without averaging it is linear decay.

    Raises:
        ConfigError: the whole run would be warmup.
    """
    kind = train.lr_scheduler_type
    if kind == "auto":
        kind = "constant_with_warmup" if averaging else "linear"
    warmup_steps = 0 if kind == "constant" else warmup_length(train.warmup_steps, total_steps)
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} makes {warmup_steps} of the run's {total_steps} steps a "
            "warmup, so the rate never reaches train.learning_rate; lower it (0 for none), or train longer"
        )
    return Schedule(kind=kind, peak=train.learning_rate, warmup_steps=warmup_steps, total_steps=total_steps)


def warmup_length(warmup_steps: int | float, total_steps: int) -> int:
    """Return the warmup in optimizer steps: below 1 it is a share of the run (rounded up), else steps."""
    return math.ceil(share_of(total_steps, warmup_steps)) if warmup_steps < 1 else int(warmup_steps)


def rate_factors(optimizer: torch.optim.Optimizer, peak: float) -> list[float]:
    """Return what multiplies the schedule's rate in each parameter group, before the schedule is first written.

    It is the group's own rate divided by the schedule's ``peak``, or 1 for every group if all have the same rate.
    Works through accelerate's and DeepSpeed's wrappers.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    if all(rate == rates[0] for rate in rates):
        return [1.0] * len(rates)
    return [rate / peak for rate in rates]


def count_micro_batches(*, num_rows: int, batch_size: int, world_size: int) -> int:
    """Return the micro-batches per rank and epoch: the length of a loader once accelerate has prepared it.

    The last batch of an epoch may have fewer rows than ``batch_size``; each rank gets equally many batches.
    """
    return math.ceil(math.ceil(num_rows / batch_size) / world_size)


def count_optimizer_steps(train: TrainConfig, micro_batches: int) -> int:
    """Return the optimizer steps of a run, counted as in transformers' Trainer except for its rounding of floats.

    Args:
        train: section ``train``; a positive ``max_steps`` wins. Micro-batches left over from accumulation at the
            end of an epoch make a step of their own.
        micro_batches: length of the prepared loader, that is, per rank and epoch.
    """
    if train.max_steps > 0:
        return train.max_steps
    return math.ceil(share_of(count_epoch_steps(train, micro_batches), train.num_train_epochs))


def count_epoch_steps(train: TrainConfig, micro_batches: int) -> int:
    """Return the optimizer steps of a pass over this many micro-batches of a rank, at least 1."""
    return max(math.ceil(micro_batches / train.gradient_accumulation_steps), 1)


def planned_steps(train: TrainConfig, *, num_rows: int, world_size: int) -> int:
    """Return the optimizer steps that a run on this many rows and ranks will take, known before it starts."""
    batch_size = train.per_device_train_batch_size
    batches = count_micro_batches(num_rows=num_rows, batch_size=batch_size, world_size=world_size)
    return count_optimizer_steps(train, batches)
