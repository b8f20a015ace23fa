"""The training loop that all recipes share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swaft.averaging import Engine, WeightAverager
from swaft.config import TrainConfig
from swaft.errors import TrainingError
from swaft.noise import ObjectiveOutput
from swaft.training.accumulation import loss_factors, step_batches
from swaft.training.evaluate import without_row_id
from swaft.training.meter import Meter
from swaft.training.progress import ProgressLog
from swaft.training.run.position import Position
from swaft.training.schedule import Schedule, set_learning_rate

Objective = Callable[[nn.Module, dict[str, Any]], ObjectiveOutput]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What training took."""

    steps: int
    """Optimizer steps of the run, skipped ones included."""
    applied_steps: int
    """Optimizer steps that changed the weights."""
    seconds: float
    """Time in training steps, evaluation and logging excluded."""
    stopped_early: bool = False
    """Whether an evaluation ended the run before its last step."""


def train(
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    objective: Objective,
    engine: Engine,
    schedule: Schedule,
    settings: TrainConfig,
    progress: ProgressLog,
    meter: Meter,
    position: Position,
    averager: WeightAverager | None = None,
    validate: Callable[[int], bool] | None = None,
    eval_steps: int | None = None,
    save: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """Train to ``schedule.total_steps`` optimizer steps, or until an evaluation ends the run (collective).

    Args:
        accelerator: that prepared model, optimizer and loader.
        model: as prepared, and so for ``optimizer`` and ``loader``.
        optimizer: whose rate follows ``schedule``.
        loader: training batches; one pass over it is an epoch.
        objective: loss of a micro-batch, for instance `swaft.R3F`; a mean over the rows that count.
        engine: knows which optimizer steps really happened.
        schedule: rate by applied step, and the length of the run.
        settings: section ``train``: accumulation, clipping, logging.
        progress: is told every ``logging_steps``.
        meter: sums what is logged.
        position: where to begin; moved along, and true whenever one of the functions below is called.
        averager: takes the weights in as they move.
        validate: evaluates the weights, given the number of steps; returns whether to end the run, the same on
            every rank.
        eval_steps: optimizer steps between evaluations; None: none during training.
        save: writes a checkpoint; called every ``save_steps``, the end apart.
        check: called after every step; raises where the run is to end.

    Raises:
        Interrupted: `check` or an evaluation raised it; the position is one to go on from.
        TrainingError: on every rank, where a loss is not finite; the weights are those of the step before.
    """

    def evaluate() -> None:
        if validate and not position.evaluated:
            with meter.paused():
                position.stopped = validate(position.step)
            position.evaluated = True

    def is_over() -> bool:
        return position.stopped or position.step == schedule.total_steps

    model.train()
    set_learning_rate(optimizer, schedule(engine.applied_steps()))
    evaluate()  # where the run before was ended while it did
    steps = step_batches(
        loader, settings.gradient_accumulation_steps, epoch=position.epoch, skip=position.batches
    )
    while not is_over():
        epoch, batches_read, batches = next(steps)
        step = position.step + 1
        factors = loss_factors([batch.count for batch in batches], accelerator)
        for batch, factor in zip(batches, factors, strict=True):
            # accelerate would ask the loader, which has been read to the end of the step already.
            accelerator.sync_gradients = batch is batches[-1]
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
                out = objective(model, without_row_id(batch.inputs))
                meter.add(out, batch.inputs, batch.count)
                if accelerator.sync_gradients and meter.found_bad_loss():
                    raise _bad_loss(step, schedule(engine.applied_steps()), accelerator)
                accelerator.backward(out.loss * factor)
        grad_norm = clip_gradients(accelerator, model, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if averager is not None:
            averager.step()
        progress.advance()
        applied_rate = optimizer.param_groups[0]["lr"]
        set_learning_rate(optimizer, schedule(engine.applied_steps()))
        position.step, position.epoch, position.batches = step, epoch, batches_read
        last = step == schedule.total_steps
        if last or step % settings.logging_steps == 0:
            record = meter.read() | {
                "grad_norm": _grad_norm(model, grad_norm),
                "learning_rate": applied_rate,
            }
            progress.training(step, record | _averaged_so_far(averager))
        position.evaluated = last or not eval_steps or step % eval_steps > 0
        evaluate()
        if settings.save_steps and step % settings.save_steps == 0 and not is_over():
            with meter.paused():
                save()
        check()
    return TrainingResult(
        steps=position.step,
        applied_steps=engine.applied_steps(),
        seconds=meter.seconds,
        stopped_early=position.stopped,
    )


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_grad_norm: float) -> Tensor | None:
    """Clip the gradients of a finished accumulation; return their norm before.

    DeepSpeed clips by itself, inside backward, to the ``gradient_clipping`` of its configuration; its norm is
    read only where it is shown. A limit of 0 clips nothing.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return None
    return accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))


def _grad_norm(model: nn.Module, norm: Tensor | None) -> float | None:
    """Norm of the last step's gradients before clipping, None where the engine does not measure it."""
    measure: Any = getattr(model, "get_global_grad_norm", None)  # DeepSpeed's engine has it
    measured = norm if measure is None else measure()
    return None if measured is None else float(measured)


def _averaged_so_far(averager: WeightAverager | None) -> dict[str, float | None]:
    return {} if averager is None else {"num_averaged": averager.num_averaged}


def _bad_loss(step: int, rate: float, accelerator: Accelerator) -> TrainingError:
    return TrainingError(
        f"the loss of optimizer step {step} is not finite (learning rate {rate:.3g}, mixed precision "
        f"{accelerator.mixed_precision}); the step was not taken. Lower train.learning_rate or noise.sigma, "
        "check that train.max_grad_norm is on, and look at the rows for empty texts or labels that are not "
        "numbers"
    )
