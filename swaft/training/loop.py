"""The training loop that all recipes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from swaft.training.evaluate import Scores, evaluate_last_and_averaged, without_row_id
from swaft.training.meter import Meter
from swaft.training.progress import ProgressLog
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
    averager: WeightAverager | None = None,
    evaluate_once: Callable[[], Scores] | None = None,
    eval_steps: int | None = None,
) -> TrainingResult:
    """Train for ``schedule.total_steps`` optimizer steps (collective).

    Args:
        accelerator: that prepared model, optimizer and loader.
        model: as prepared, and so for ``optimizer`` and ``loader``.
        optimizer: whose rate follows ``schedule``.
        loader: training batches; one pass over it is an epoch.
        objective: loss of a micro-batch, for instance `swaft.R3F`.
        engine: knows which optimizer steps really happened.
        schedule: rate by applied step, and the length of the run.
        settings: section ``train``: accumulation, clipping, logging.
        progress: is told every ``logging_steps``.
        averager: takes the weights in as they move.
        evaluate_once: scores the weights that are in the model; called for the last and the averaged weights.
        eval_steps: optimizer steps between evaluations; None: none during training.

    Raises:
        TrainingError: on every rank, where a loss is not finite; the weights are those of the step before.
    """
    accumulation = settings.gradient_accumulation_steps
    meter = Meter(accelerator)
    step = 0
    model.train()
    set_learning_rate(optimizer, schedule(engine.applied_steps()))
    for batch, micro_batches in endless(loader, accumulation):
        with accelerator.accumulate(model):
            out = objective(model, without_row_id(batch))
            meter.add(out, batch)
            if accelerator.sync_gradients and meter.found_bad_loss():
                raise _bad_loss(step + 1, schedule(engine.applied_steps()), accelerator)
            # backward divides by `accumulation`, also where the epoch ends on fewer micro-batches
            accelerator.backward(out.loss * (accumulation / micro_batches))
            grad_norm = clip_gradients(accelerator, model, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if averager is not None:
            averager.step()
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress.advance()
        applied_rate = optimizer.param_groups[0]["lr"]
        set_learning_rate(optimizer, schedule(engine.applied_steps()))
        last = step == schedule.total_steps
        if last or step % settings.logging_steps == 0:
            record = meter.read() | {
                "grad_norm": _grad_norm(model, grad_norm),
                "learning_rate": applied_rate,
            }
            progress.training(step, record | _averaged_so_far(averager))
        if evaluate_once and eval_steps and step % eval_steps == 0 and not last:
            with meter.paused():
                progress.evaluation(step, "validation", evaluate_last_and_averaged(evaluate_once, averager))
        if last:
            break
    return TrainingResult(steps=step, applied_steps=engine.applied_steps(), seconds=meter.seconds)


def endless(loader: DataLoader[Any], accumulation: int) -> Iterator[tuple[Any, int]]:
    """Yield batches epoch after epoch, each with the number of micro-batches in its optimizer step.

    That number is ``accumulation``, and less in the last step of an epoch whose length it does not divide.
    """
    whole, rest = divmod(len(loader), accumulation)
    while True:
        for index, batch in enumerate(loader):
            yield batch, accumulation if index < whole * accumulation else rest


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_grad_norm: float) -> Tensor | None:
    """Clip the gradients of a finished accumulation; return their norm before.

    DeepSpeed clips by itself, inside backward, to the ``gradient_clipping`` of its configuration; its norm is
    read only where it is shown. A limit of 0 clips nothing.
    """
    if not accelerator.sync_gradients or accelerator.distributed_type == DistributedType.DEEPSPEED:
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
