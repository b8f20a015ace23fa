"""The learning rate as a pure function of how many optimizer steps have been applied.

No scheduler object: accelerate would step one ``num_processes`` times per optimizer step, and a skipped step
would need its own bookkeeping. The shapes, and the first step at rate zero during a warm-up, are those of
transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from swaft.errors import ConfigError
from swaft.fraction import share_of

Kind = Literal["linear", "cosine", "constant_with_warmup", "constant"]


class ScheduleSettings(Protocol):
    """The settings of section ``train`` that decide the rate."""

    learning_rate: float
    lr_scheduler_type: Literal["auto", "linear", "cosine", "constant_with_warmup", "constant"]
    warmup_steps: int | float


class LengthSettings(Protocol):
    """The settings of section ``train`` that decide how long a run is."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_train_epochs: float
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Rate of every optimizer step of a run.

    With ``s`` applied steps, ``w`` warm-up steps and ``T`` steps in all, the rate is ``peak`` times

        s / w                                   while s < w (not for ``constant``),
        1                                       for ``constant`` and ``constant_with_warmup``,
        (T - s) / (T - w)                       for ``linear``,
        (1 + cos(pi * (s - w) / (T - w))) / 2   for ``cosine``.
    """

    kind: Kind
    """Shape after the warm-up."""
    peak: float
    """Rate at the end of the warm-up."""
    warmup_steps: int
    """Optimizer steps until ``peak`` is reached."""
    total_steps: int
    """Optimizer steps of the run."""

    def __call__(self, applied_steps: int) -> float:
        """Return the rate of the next step.

        Args:
            applied_steps: optimizer steps that have happened; overflow skips do not count.
        """
        return self.peak * self._share(applied_steps)

    def _share(self, step: int) -> float:
        if self.kind == "constant":
            return 1.0
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.kind == "constant_with_warmup":
            return 1.0
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return max(0.0, (self.total_steps - step) / decay_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - self.warmup_steps) / decay_steps))))


def build_schedule(train: ScheduleSettings, *, total_steps: int, averaging: bool) -> Schedule:
    """Return the schedule a run asks for.

    Args:
        train: section ``train`` of the configuration.
        total_steps: optimizer steps of the run.
        averaging: whether weights are averaged. ``auto`` is then constant after warm-up, because a rate that
            decays to zero leaves averaging nothing to average; without averaging it is linear decay.

    Raises:
        ConfigError: the whole run would be warm-up.
    """
    kind: Kind
    if train.lr_scheduler_type == "auto":
        kind = "constant_with_warmup" if averaging else "linear"
    else:
        kind = train.lr_scheduler_type
    warmup_steps = 0 if kind == "constant" else warmup_length(train.warmup_steps, total_steps)
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} makes {warmup_steps} of the run's {total_steps} steps a "
            "warm-up, so the rate never reaches train.learning_rate; lower it (0 for none), or train longer"
        )
    return Schedule(kind=kind, peak=train.learning_rate, warmup_steps=warmup_steps, total_steps=total_steps)


def warmup_length(warmup_steps: int | float, total_steps: int) -> int:
    """Return the warm-up in optimizer steps: below 1 it is a share of the run (rounded up), else steps."""
    return math.ceil(share_of(total_steps, warmup_steps)) if warmup_steps < 1 else int(warmup_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write ``rate`` into every parameter group; works through accelerate's and DeepSpeed's wrappers."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def count_micro_batches(*, num_rows: int, batch_size: int, world_size: int) -> int:
    """Return the micro-batches per rank and epoch: the length of a loader once accelerate has prepared it.

    Args:
        num_rows: training rows.
        batch_size: rows per rank and micro-batch; the last one of an epoch may have fewer.
        world_size: ranks, each of which gets equally many.
    """
    return math.ceil(math.ceil(num_rows / batch_size) / world_size)


def count_optimizer_steps(
    *, micro_batches: int, accumulation_steps: int, num_train_epochs: float, max_steps: int
) -> int:
    """Return the optimizer steps of a run, counted as transformers' Trainer does, but for its rounding of floats.

    Args:
        micro_batches: length of the prepared loader, that is per rank and epoch.
        accumulation_steps: micro-batches per optimizer step; the rest at the end of an epoch makes a step of
            its own.
        num_train_epochs: passes over the rows; a fraction is allowed.
        max_steps: wins where it is positive.
    """
    if max_steps > 0:
        return max_steps
    steps_per_epoch = max(math.ceil(micro_batches / accumulation_steps), 1)
    return math.ceil(share_of(steps_per_epoch, num_train_epochs))


def planned_steps(train: LengthSettings, *, num_rows: int, world_size: int) -> int:
    """Return the optimizer steps that a run will take, told before it starts.

    Args:
        train: section ``train`` of the configuration.
        num_rows: training rows.
        world_size: ranks that share them.
    """
    batch_size = train.per_device_train_batch_size
    return count_optimizer_steps(
        micro_batches=count_micro_batches(num_rows=num_rows, batch_size=batch_size, world_size=world_size),
        accumulation_steps=train.gradient_accumulation_steps,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
    )
