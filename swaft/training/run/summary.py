"""What is said about a run before it starts and after it has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from swaft.averaging import ReadoutSearch, WeightAverager
from swaft.training.config import TrainConfig
from swaft.training.evaluation.best import Best
from swaft.training.evaluation.evaluate import Evaluation
from swaft.training.launch.accelerator import engine_name
from swaft.training.models.build import ParameterCount
from swaft.training.run.schedule import Schedule


def run_facts(
    train: TrainConfig,
    accelerator: Accelerator,
    *,
    task: str,
    num_rows: int,
    num_parameters: ParameterCount,
    schedule: Schedule,
    averager: WeightAverager | None,
) -> dict[str, Any]:
    """Return the facts of a run for its banner, by the names people know from transformers' Trainer.

    Args:
        train: section ``train``.
        accelerator: after ``prepare``.
        task: what is learnt, in words.
        num_rows: training rows.
        num_parameters: of the whole model, those that are trained apart.
        schedule: learning rate and length of the run.
        averager: None without averaging.
    """
    per_step = (
        train.per_device_train_batch_size * train.gradient_accumulation_steps * accelerator.num_processes
    )
    precision = "fp32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} over fp32"
    facts = {
        "Task": task,
        "Num examples": num_rows,
        "Num epochs": f"{schedule.total_steps * per_step / num_rows:.2f}",
        "Instantaneous batch size per device": train.per_device_train_batch_size,
        "Total train batch size (w. parallel, distributed & accumulation)": per_step,
        "Gradient accumulation steps": train.gradient_accumulation_steps,
        "Total optimization steps": schedule.total_steps,
        "Number of trainable parameters": str(num_parameters),
        "Learning rate": f"{schedule.peak:g} {schedule.kind}, {schedule.warmup_steps} warm-up steps",
        "Engine": engine_name(accelerator),
        "Ranks": f"{accelerator.num_processes} on {accelerator.device.type}",
        "Precision": precision,
        "Averaging": "none",
    }
    if averager is not None:
        plan = averager.plan()
        facts["Averaging"] = f"{plan.num_members:,} weights from step {plan.first_step:,} on"
        facts["Averaging takes"] = "; ".join(str(averager.forecast()).splitlines())
    return facts


def summary(
    evaluations: Mapping[str, Mapping[str, Evaluation]],
    *,
    steps: int,
    applied_steps: int,
    seconds: float,
    stopped_early: bool,
    metric_name: str,
    averager: WeightAverager | None,
    window: ReadoutSearch | None = None,
    best: Best | None = None,
) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        evaluations: by split and kind of weights (``last``, ``averaged``).
        steps: optimizer steps of the run, skipped ones included.
        applied_steps: those that changed the weights.
        seconds: time in training steps, evaluation and saving excluded.
        stopped_early: whether an evaluation ended the run before its last step.
        metric_name: the score that counts.
        averager: None without averaging.
        window: what was averaged, where that was chosen after training.
        best: the weights that scored best on validation rows, where they were kept or ended the run.
    """
    content: dict[str, Any] = {
        "metric": metric_name,
        "scores": _each(evaluations, lambda evaluation: evaluation.scores),
        "steps": steps,
        "applied_steps": applied_steps,
        "num_averaged": 0 if averager is None else averager.num_averaged,
        "train_seconds": round(seconds, 3),
    }
    if stopped_early:
        content["stopped_early_at"] = steps
    if best is not None:
        content["best"] = asdict(best)
    if any(evaluation.details for kinds in evaluations.values() for evaluation in kinds.values()):
        content["details"] = _each(evaluations, lambda evaluation: evaluation.details)
    if averager is not None:
        # How often training stood still for averaging, and how long in all.
        content["averaging_waits"] = averager.waits.count
        content["averaging_wait_seconds"] = round(averager.waits.seconds, 3)
    if window is not None:
        content["window"] = window.best.row()
        content["windows_tried"] = [each.row() for each in window.tried]
    return content


def _each(
    evaluations: Mapping[str, Mapping[str, Evaluation]], part: Callable[[Evaluation], Any]
) -> dict[str, dict[str, Any]]:
    return {
        split: {kind: part(evaluation) for kind, evaluation in kinds.items()}
        for split, kinds in evaluations.items()
    }
