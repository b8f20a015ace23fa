"""The learning rate as a pure function of how many optimizer steps have been applied.

No scheduler object: accelerate would step one ``num_processes`` times per optimizer step, and a skipped step
would need its own bookkeeping. The shapes, and the first step at rate zero during a warm-up, are those of
transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from swaft.errors import ConfigError
from swaft.fraction import share_of
from swaft.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Rate of every optimizer step of a run.

    With ``s`` applied steps, ``w`` warm-up steps and ``T`` steps in all, the rate is ``peak`` times

        s / w                                   while s < w (not for ``constant``),
        1                                       for ``constant`` and ``constant_with_warmup``,
        (T - s) / (T - w)                       for ``linear``,
        (1 + cos(pi * (s - w) / (T - w))) / 2   for ``cosine``.
    """

    kind: str
    """Shape after the warm-up: ``linear``, ``cosine``, ``constant_with_warmup`` or ``constant``."""
    peak: float
    """Rate at the end of the warm-up."""
    warmup_steps: int
    """Optimizer steps until ``peak`` is reached; 0 for ``constant``."""
    total_steps: int
    """Optimizer steps of the run."""

    def __call__(self, applied_steps: int) -> float:
        """Return the rate of the step after so many applied ones; overflow skips do not count."""
        return self.peak * self._share(applied_steps)

    def __str__(self) -> str:
        """Write it for the banner of a run."""
        return f"{self.peak:g} {self.kind}, {self.warmup_steps} warm-up steps"

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
    """Return the schedule a run asks for.

    Args:
        train: section ``train`` of the configuration.
        total_steps: optimizer steps of the run.
        averaging: whether weights are averaged. ``auto`` is then constant after warm-up, because a rate that
            decays to zero leaves averaging nothing to average; without averaging it is linear decay.

    Raises:
        ConfigError: the whole run would be warm-up.
    """
    kind = train.lr_scheduler_type
    if kind == "auto":
        kind = "constant_with_warmup" if averaging else "linear"
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

    The last one of an epoch may have fewer rows than ``batch_size``; each rank gets equally many batches.
    """
    return math.ceil(math.ceil(num_rows / batch_size) / world_size)


def count_optimizer_steps(train: TrainConfig, micro_batches: int) -> int:
    """Return the optimizer steps of a run, counted as transformers' Trainer does, but for its rounding of floats.

    Args:
        train: section ``train``; a positive ``max_steps`` wins. What accumulation leaves over at the end of an
            epoch makes a step of its own.
        micro_batches: length of the prepared loader, that is per rank and epoch.
    """
    if train.max_steps > 0:
        return train.max_steps
    steps_per_epoch = max(math.ceil(micro_batches / train.gradient_accumulation_steps), 1)
    return math.ceil(share_of(steps_per_epoch, train.num_train_epochs))


def planned_steps(train: TrainConfig, *, num_rows: int, world_size: int) -> int:
    """Return the optimizer steps that a run on so many rows and ranks will take, known before it starts."""
    batch_size = train.per_device_train_batch_size
    batches = count_micro_batches(num_rows=num_rows, batch_size=batch_size, world_size=world_size)
    return count_optimizer_steps(train, batches)
